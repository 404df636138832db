"""Gates on units of width that are learned open or shut, with a price that leads to a fixed number of open ones."""

from __future__ import annotations

import math

import torch
from torch import nn

from llmprune.arch.units import Units
from llmprune.methods.width.choice import lowest

# Louizos et al. 2018, "Learning Sparse Neural Networks through L0 Regularization", section 2.2
TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1
# At first a gate is 1 but for its noise.
START = 3.0


class Gate(nn.Module):
    """A factor for the input columns of a writing matrix that each of U units owns: 1 leaves a unit, 0 takes it out.

    In training a factor is a hard concrete variable: s = sigmoid((logit u + log_alpha) / TEMPERATURE), u uniform, stretched
    to (LOW, HIGH) and cut to [0, 1]. Once the choice is `made`, and where nothing is trained, it is sigmoid(log_alpha),
    stretched and cut, and 0 for all but the `open` units with the highest log_alpha, as many in each stratum.
    `multipliers`: the two of the price.
    """

    unit_I: torch.Tensor
    open: torch.Tensor
    made: torch.Tensor

    def __init__(self, units: Units, device: torch.device) -> None:
        super().__init__()
        assert units.writer is not None and units.columns_UN is not None
        self._strata, self._input_axis = units.strata, units.writer.input_axis
        # which unit a column belongs to; of experts, a row of columns for each
        owners = units.strata if units.stacked else 1
        unit_OI = torch.empty(owners, units.columns_UN.numel() // owners, dtype=torch.int64)
        for owner, (unit_U, columns_UN) in enumerate(
            zip(torch.arange(units.count).chunk(owners), units.columns_UN.chunk(owners), strict=True)
        ):
            unit_OI[owner, columns_UN.flatten()] = unit_U.repeat_interleave(columns_UN.shape[1])
        self.register_buffer("unit_I", (unit_OI if units.stacked else unit_OI[0]).to(device), persistent=False)
        self.register_buffer("open", torch.tensor(units.count))
        self.register_buffer("made", torch.tensor(False))
        self.log_alpha = nn.Parameter(torch.full((units.count,), START, device=device))
        self.multipliers = nn.Parameter(torch.zeros(2, device=device))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        factor_U = self.drawn() if self.training and not self.made else self.settled().detach()
        factor_I = factor_U[self.unit_I].to(weight.dtype)
        return weight * factor_I.unsqueeze(-1 if self._input_axis < weight.dim() - 1 else -2)

    def drawn(self) -> torch.Tensor:
        """Factors with noise, U."""
        noise_U = torch.rand_like(self.log_alpha).clamp(1e-6, 1 - 1e-6).logit()
        return _stretched((noise_U + self.log_alpha) / TEMPERATURE)

    def settled(self) -> torch.Tensor:
        """Factors without noise, U: exactly as many units are open as may be."""
        gone = torch.tensor(self.gone(), dtype=torch.int64, device=self.log_alpha.device)
        return _stretched(self.log_alpha).index_fill(0, gone, 0.0)

    def gone(self) -> list[int]:
        """The units that are shut for good: the lowest log_alpha, ties to the lowest number."""
        return lowest(self.log_alpha.detach(), len(self.log_alpha) - int(self.open), self._strata)

    def open_share(self) -> torch.Tensor:
        """The expected share of factors that are not 0 (Louizos et al. 2018, eq. 12)."""
        return (self.log_alpha - TEMPERATURE * math.log(-LOW / HIGH)).sigmoid().mean()

    def price(self) -> torch.Tensor:
        """m1 g + m2 g^2 for the gap g between the open share and that which is due; the multipliers m rise with it.

        Nothing once the choice is made; the gradient is then zero, which processes can still add up.
        """
        if self.made:
            return 0 * (self.log_alpha.sum() + self.multipliers.sum())
        gap = self.open_share() - self.open / len(self.log_alpha)
        return self.multipliers[0] * gap + self.multipliers[1] * gap.square()


def _stretched(logit_U: torch.Tensor) -> torch.Tensor:
    return (logit_U.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)
