"""A method with more before and after it: target, refinement of its mask, weights for the mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from llmprune.linalg import Scaled
from llmprune.solvers.least_squares import least_squares
from llmprune.solvers.retarget import retarget
from llmprune.solvers.subsets import exact
from llmprune.solvers.swaps import swaps
from llmprune.solvers.sweep import sweep_mask
from llmprune.statistics import DRIFT, GRAM, Stats
from llmprune.types import Budget, Edit, Matrix, Method

# mask O x I, from the target weights, a mask, the Gram matrix and the budget
REFINEMENTS: dict[str, Callable[[torch.Tensor, torch.Tensor, Scaled, Budget], torch.Tensor]] = {"swaps": swaps}
# weights O x I, from the target weights, the final mask, the Gram matrix and the method's own weights
UPDATES: dict[str, Callable[[torch.Tensor, torch.Tensor, Scaled, torch.Tensor], torch.Tensor]] = {
    "least-squares": lambda target_OI, pruned_OI, system, start_OI: least_squares(
        target_OI, pruned_OI, system, start_OI=start_OI
    ),
    "exact": lambda target_OI, pruned_OI, system, start_OI: exact(target_OI, pruned_OI, system),
    "sparsegpt": lambda target_OI, pruned_OI, system, start_OI: sweep_mask(target_OI, pruned_OI, system),
}


@dataclass(frozen=True)
class Composed:
    """`method`, given a moved target (`retarget`), then `refine` on its mask, then `update` on the weights.

    Each step is optional. Steps use the Gram matrix scaled to unit diagonal with `damping` added.
    """

    method: Method
    refine: str | None
    update: str | None
    retarget: float
    damping: float = 0.01

    kind: ClassVar[str] = "weight"
    output: ClassVar[str] = "plain"

    @property
    def needs(self) -> frozenset[str]:
        return self.method.needs | {GRAM} | ({DRIFT} if self.retarget else frozenset())

    @property
    def patterns(self) -> tuple[str, ...]:
        return self.method.patterns

    @property
    def paper(self) -> str:
        return self.method.paper

    def planned(self, outputs: int, inputs: int, budget: Budget) -> int:
        return self.method.planned(outputs, inputs, budget)

    def solve(self, matrix: Matrix, stats: Stats | None, budget: Budget) -> Edit:
        assert stats is not None
        outputs, inputs = matrix.weight_OI.shape
        if not self.planned(outputs, inputs, budget):
            return self.method.solve(matrix, stats, budget)
        system = stats.scaled(self.damping)
        target_OI, notes = matrix.weight_OI, {}
        if self.retarget and stats.paired:
            target_OI = retarget(target_OI, stats.pull_OI(target_OI), system, self.retarget)
        elif self.retarget:
            notes["retarget"] = "not possible: its tokens cannot be paired with the dense model's"
        edit = self.method.solve(replace(matrix, weight_OI=target_OI), stats, budget)
        weight_OI, pruned_OI = edit.weight_OI, edit.pruned_OI
        if self.refine:
            pruned_OI = REFINEMENTS[self.refine](target_OI, pruned_OI, system, budget)
            weight_OI = torch.where(edit.pruned_OI, target_OI, weight_OI).masked_fill(pruned_OI, 0)
        if self.update:
            weight_OI = UPDATES[self.update](target_OI, pruned_OI, system, weight_OI).masked_fill(pruned_OI, 0)
        return Edit(weight_OI, pruned_OI, {**edit.notes, **notes})
