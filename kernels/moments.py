"""Column moments: sum of squares, mean and variance of every input, streamed."""

from __future__ import annotations

import torch

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
        """Add tokens. Cast to float32 before squaring: half-precision squares overflow above 256."""
        for rows_TI in x_TI.split(ROWS):
            rows_TI = rows_TI.float()
            count = rows_TI.shape[0]
            if count == 0:
                continue
            self.square_sums_I += torch.linalg.vector_norm(rows_TI, dim=0).square()
            mean_I = rows_TI.mean(0)
            deviation_I = (rows_TI - mean_I).square().sum(0)
            total = self.tokens + count
            gap_I = mean_I - self.mean_I
            self.mean_I += gap_I * (count / total)
            self._deviation_I += deviation_I + gap_I.square() * (self.tokens * count / total)
            self.tokens = total

    @property
    def variance_I(self) -> torch.Tensor:
        return self._deviation_I / max(self.tokens, 1)
