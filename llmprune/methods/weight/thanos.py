"""Thanos: all removals of a block of columns at once, by the scores of Wanda."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llmprune import masks
from llmprune.solvers.subsets import solve_subsets
from llmprune.solvers.sweep import block_width, planned_by_block, sweep
from llmprune.statistics import GRAM, Stats
from llmprune.types import Budget, Edit, Matrix


@dataclass(frozen=True)
class Thanos:
    """In each block of columns remove the lowest |w| * ||x|| and solve for all of a row's removals jointly.

    Ilin and Richtarik 2025, "Thanos: A Block-wise Pruning Algorithm for Efficient Large Language Model
    Compression", algorithm 1. The compensation is the optimal one for the columns from the block's start on.
    Deviations: exact counts, norms in float32, no rows left out, and one factorization of the Gram matrix
    serves all blocks, where the paper inverts what is left of it for each.

    `damping`: fraction of the mean of the Gram diagonal added to it. `block`: columns solved together.
    """

    damping: float = 0.01
    block: int = 128

    kind: ClassVar[str] = "weight"
    needs: ClassVar[frozenset[str]] = frozenset({GRAM})
    patterns: ClassVar[tuple[str, ...]] = ("unstructured", "N:M")
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2504.05346"

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping {self.damping} must be above 0 and at most 1")
        if self.block < 1:
            raise ValueError(f"block {self.block} must be at least 1 column")

    def planned(self, outputs: int, inputs: int, budget: Budget) -> int:
        return planned_by_block(outputs, inputs, self.block, budget)

    def solve(self, matrix: Matrix, stats: Stats | None, budget: Budget) -> Edit:
        assert stats is not None
        outputs, inputs = matrix.weight_OI.shape
        if not self.planned(outputs, inputs, budget):
            return Edit.unchanged(matrix.weight_OI)
        factor = stats.factor(self.damping)
        norm_I = stats.square_sums_I.sqrt()

        def solve(
            here: slice, current_BO: torch.Tensor, inverse_t_BB: torch.Tensor, pruned_BO: torch.Tensor
        ) -> torch.Tensor:
            pruned_OB = masks.select(current_BO.T.abs() * norm_I[here], budget, by="matrix")
            pruned_BO.copy_(pruned_OB.T)
            # the block of the inverse of what is left of H: only these rows of U reach these columns
            inverse_BB = inverse_t_BB @ inverse_t_BB.T
            multiplier_OB = solve_subsets(inverse_BB, pruned_OB, current_BO.T.contiguous())
            current_BO.addmm_(inverse_BB, multiplier_OB.T, alpha=-1).masked_fill_(pruned_BO, 0)
            return torch.sum((multiplier_OB @ inverse_t_BB).square(), dim=1, dtype=torch.float64)

        (edit,) = sweep(matrix.weight_OI, factor, block_width(self.block, budget), solve).edits([outputs])
        if factor.damping != self.damping or factor.float64:
            edit.notes = {"damping": factor.damping, "float64": factor.float64}
        return edit
