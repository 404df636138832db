"""Column moments: sum of squares, mean and variance of every input, streamed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmprune.kernels import dispatch

ROWS = 8192


class Moments:
    """Running per-column moments over tokens, in float32.

    Batches are combined by the rule of Chan, Golub and LeVeque (1979), which does not cancel
    when the mean is large against the spread.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self.square_sums_I = torch.zeros(width, device=device)
        self.mean_I = torch.zeros(width, device=device)
        self._deviation_I = torch.zeros(width, device=device)

    def update(self, x_TI: torch.Tensor) -> None:
        """Add tokens, T x width, of any float dtype."""
        for rows_TI in x_TI.split(ROWS):
            count = rows_TI.shape[0]
            if count == 0:
                continue
            self._add(count, *dispatch.run("column_moments", rows_TI))

    def merge(self, later: Moments) -> None:
        """Add the moments of further tokens."""
        if later.tokens:
            self._add(later.tokens, later.square_sums_I, later.mean_I, later._deviation_I)

    def pool(self, own: int, tokens: int, sum_: Callable[[torch.Tensor], None]) -> None:
        """Make these, of `own` tokens, the moments of `tokens` in all processes; `sum_` adds a tensor up over them."""
        own_I = self.mean_I
        self.mean_I = own_I * (own / max(tokens, 1))
        sum_(self.mean_I)
        self._deviation_I += (own_I - self.mean_I).square() * own
        sum_(self._deviation_I)
        sum_(self.square_sums_I)
        self.tokens = tokens

    def tensors(self) -> list[torch.Tensor]:
        return [self.square_sums_I, self.mean_I, self._deviation_I]

    def _add(self, count: int, square_sums_I: torch.Tensor, mean_I: torch.Tensor, deviation_I: torch.Tensor) -> None:
        self.square_sums_I += square_sums_I
        total = self.tokens + count
        gap_I = mean_I - self.mean_I
        self.mean_I += gap_I * (count / total)
        self._deviation_I += deviation_I + gap_I.square() * (self.tokens * count / total)
        self.tokens = total

    @property
    def variance_I(self) -> torch.Tensor:
        return self._deviation_I / max(self.tokens, 1)


def column_moments_torch(x_TI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of every column: sum of squares, mean, and sum of squared deviations from the mean, in float32."""
    # cast before squaring: half-precision squares overflow above 256
    x_TI = x_TI.float()
    mean_I = x_TI.mean(0)
    return torch.linalg.vector_norm(x_TI, dim=0).square(), mean_I, (x_TI - mean_I).square().sum(0)
