"""SparseGPT: prune column by column, and let the columns to come make up for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llmprune.kernels.product import product_nt
from llmprune.kernels.sparsegpt_block import solve_block
from llmprune.linalg import Factor, reversed_cholesky
from llmprune.statistics import GRAM, Stats
from llmprune.types import Budget, Edit, Matrix


@dataclass(frozen=True)
class SparseGPT:
    """One-shot pruning with exact second-order compensation, left to right.

    Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
    One-Shot", algorithm 1. Masks and weights are the reference's; the arithmetic is not: the sweep
    is left-looking, so it needs the factor R of the damped Gram matrix and the inverses of its
    diagonal blocks only, and every finished column is read instead of every later one rewritten.
    Deviations: exact counts with ties to the lowest index (the reference prunes one more in each
    block); columns that were never active are damped, not zeroed.

    `damping`: fraction of the mean of the Gram diagonal added to it. `block`: columns whose mask
    is chosen together.
    """

    damping: float = 0.01
    block: int = 128

    kind: ClassVar[str] = "weight"
    needs: ClassVar[frozenset[str]] = frozenset({GRAM})
    patterns: ClassVar[tuple[str, ...]] = ("unstructured", "N:M")
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2301.00774"

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping {self.damping} must be above 0 and at most 1")
        if self.block < 1:
            raise ValueError(f"block {self.block} must be at least 1 column")

    def planned(self, outputs: int, inputs: int, budget: Budget) -> int:
        widths = (min(self._block(budget), inputs - start) for start in range(0, inputs, self._block(budget)))
        return sum(budget.pruned_of(outputs * width) for width in widths)

    def _block(self, budget: Budget) -> int:
        """The block width, rounded down so that no N:M group straddles two blocks."""
        group = max(budget.pattern.group, 1)
        return max(self.block // group, 1) * group

    def solve(self, matrix: Matrix, stats: Stats | None, budget: Budget) -> Edit:
        assert stats is not None
        outputs, inputs = matrix.weight_OI.shape
        if not self.planned(outputs, inputs, budget):
            return Edit(matrix.weight_OI, torch.zeros_like(matrix.weight_OI, dtype=torch.bool), loss=0.0)
        factor: Factor = stats.derived(
            ("reversed_cholesky", self.damping), lambda: reversed_cholesky(stats.gram_lower_II, self.damping)
        )
        # columns are processed one after the other: transposed, each is contiguous
        dense_IO = matrix.weight_OI.T.contiguous()
        change_IO = torch.zeros_like(dense_IO)
        pruned_IO = torch.zeros_like(dense_IO, dtype=torch.bool)
        loss = 0.0
        width = self._block(budget)
        for start in range(0, len(dense_IO), width):
            here = slice(start, min(start + width, len(dense_IO)))
            r_t_BB = factor.r_t_II[here, here]
            inverse_t_BB = torch.linalg.solve_triangular(
                r_t_BB, torch.eye(len(r_t_BB), device=r_t_BB.device), upper=False
            )
            current_BO = dense_IO[here].clone()
            if start:
                carried_BO = product_nt(factor.r_t_II[here, :start], change_IO[:start].T)
                current_BO.addmm_(inverse_t_BB, carried_BO)
            loss += solve_block(current_BO, inverse_t_BB, pruned_IO[here], budget)
            torch.sub(dense_IO[here], current_BO, out=change_IO[here])
        loss -= factor.shift * float(torch.sum(change_IO.square(), dtype=torch.float64))
        notes: dict[str, object] = {}
        if factor.damping != self.damping or factor.float64:
            notes = {"damping": factor.damping, "float64": factor.float64}
        pruned_weight_IO = torch.sub(dense_IO, change_IO, out=change_IO)
        return Edit(pruned_weight_IO.T, pruned_IO.T, notes, loss=max(loss, 0.0))
