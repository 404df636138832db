"""Low-rank adapters that are pruned together with the channels of their base."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate.utils import reduce

from llmprune.arch.units import Units
from llmprune.recovery.progressive import Mask, Progressive, watched
from llmprune.recovery.zeros import Target


class Sensed(Mask):
    """Notes how the loss changes with the factor of every unit: the sum of w dL/dw over the columns of a unit."""

    def __init__(self, units: Units, device: torch.device) -> None:
        super().__init__(units, device)
        self.slope_U = torch.zeros(units.count, device=device)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return super().forward(watched(weight, self._note))

    def _note(self, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        self.slope_U += self.per_unit(self.per_column(weight.float() * gradient.float()))

    def taken(self) -> torch.Tensor:
        slope_U: torch.Tensor = reduce(self.slope_U, "mean")
        self.slope_U = torch.zeros_like(slope_U)
        return slope_U.abs()


@dataclass
class Splora(Progressive):
    """Structured pruning low-rank adapters (Hedegaard et al. 2022, arXiv:2211.10155): (W + s B A) * (rows' columns' mask).

    Base and adapter are pruned as one: the rows of B and columns of A that belong to a unit go with its slices of W, so
    that merging and pruning may change places. The score of a unit is the first-order Taylor one of the fused weights, one of
    those that the paper tries: how much the loss changes with the unit's factor, without its sign. The paper
    draws both factors small (here B is zero at first), prunes image models at intervals, and keeps one base for the
    adapters of many tasks; here they are merged at the end.
    """

    def mask(self, units: Units, target: Target) -> Mask:
        return Sensed(units, target.kept.device)
