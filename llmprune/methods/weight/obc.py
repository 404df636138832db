"""OBC (ExactOBS): remove one weight at a time, and move all others after each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llmprune.linalg import inverse64
from llmprune.masks import lowest
from llmprune.solvers.obs import eliminate
from llmprune.solvers.subsets import exact
from llmprune.statistics import GRAM, Stats
from llmprune.types import Budget, Edit, Matrix


@dataclass(frozen=True)
class Obc:
    """Greedy removal by the exact loss of each row, then the best weights for the mask.

    Frantar and Alistarh 2022, "Optimal Brain Compression" (arXiv:2208.11580), algorithm 1 and section 4.
    Unstructured: every row is traced until nothing is left, and all rows' losses are ranked together: row i loses
    as many weights as it has among the lowest of the matrix. N:M: a group that has lost its share is passed over.
    Removing one by one ends at the least-squares optimum on the mask whatever the order, so that only the order is
    kept, and the weights are solved for at the end. Deviations: damped, on the Gram matrix with unit diagonal.

    Cubic in the inputs for every single row (O * I^3 multiplications in float64): for matrices of up to about a
    thousand inputs. `damping`: added to the unit diagonal.
    """

    damping: float = 0.01

    kind: ClassVar[str] = "weight"
    needs: ClassVar[frozenset[str]] = frozenset({GRAM})
    patterns: ClassVar[tuple[str, ...]] = ("unstructured", "N:M")
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2208.11580"

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise ValueError(f"damping {self.damping} must be above 0")

    def planned(self, outputs: int, inputs: int, budget: Budget) -> int:
        return budget.pruned_of(outputs * inputs)

    def solve(self, matrix: Matrix, stats: Stats | None, budget: Budget) -> Edit:
        assert stats is not None
        weight_OI = matrix.weight_OI
        outputs, inputs = weight_OI.shape
        if not self.planned(outputs, inputs, budget):
            return Edit.unchanged(weight_OI)
        system = stats.scaled(self.damping)
        inverse_II = stats.derived(("inverse64", self.damping), lambda: inverse64(system.matrix_II))
        trace = eliminate((weight_OI * system.scale_I).double(), inverse_II, budget.pattern)
        taken_OS = torch.ones_like(trace.order_OS, dtype=torch.bool)
        if not budget.pattern.structured:
            count = budget.pruned_of(weight_OI.numel())
            per_row_O1 = lowest(trace.loss_OS.reshape(1, -1), count).view_as(trace.loss_OS).sum(1, keepdim=True)
            taken_OS = torch.arange(trace.order_OS.shape[1], device=weight_OI.device) < per_row_O1
        pruned_OI = torch.zeros_like(weight_OI, dtype=torch.bool).scatter_(1, trace.order_OS, taken_OS)
        return Edit(exact(weight_OI, pruned_OI, system), pruned_OI)
