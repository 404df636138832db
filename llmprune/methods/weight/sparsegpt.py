"""SparseGPT: prune column by column, and let the columns to come make up for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from llmprune import masks
from llmprune.grid import Grid
from llmprune.kernels.sparsegpt_block import solve_block
from llmprune.linalg import Factor, reversed_cholesky
from llmprune.solvers.sweep import block_width, planned_by_block, sweep
from llmprune.statistics import GRAM, Stats
from llmprune.types import Budget, Edit, Matrix

ORDERS = ("natural", "rose")
# the order is changed where the losses of the blocks differ by more than this share of the largest
UNEVEN = 0.5


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
    is chosen together. `order`: "natural", or "rose" to take the blocks and columns that stand to lose most
    first, while many columns are left to make up for them (see `rose_order`). `bits`: round the kept weights to
    a grid of that many bits a row in the same sweep (section 3.5); 0 leaves them as they are. The grid is in the
    report; what is stored are ordinary floats on it, so the file is no smaller.
    """

    damping: float = 0.01
    block: int = 128
    order: str = "natural"
    bits: int = 0

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
        if self.order not in ORDERS:
            raise ValueError(f"order {self.order!r} must be one of {', '.join(ORDERS)}")
        if self.bits and not 2 <= self.bits <= 8:
            raise ValueError(f"bits {self.bits} must be 0 (no grid) or 2 … 8")

    def planned(self, outputs: int, inputs: int, budget: Budget) -> int:
        return planned_by_block(outputs, inputs, self.block, budget)

    def solve(self, matrix: Matrix, stats: Stats | None, budget: Budget) -> Edit:
        (edit,) = self.solve_together([matrix], stats, budget)
        return edit

    def solve_together(self, matrices: Sequence[Matrix], stats: Stats | None, budget: Budget) -> list[Edit]:
        """Matrices that share an input, in one sweep over its columns: as one matrix that has the outputs of all."""
        assert stats is not None
        if len(matrices) > 1 and (self.bits or self.order == "rose"):  # grids and orders belong to a matrix
            return [self.solve(one, stats, budget) for one in matrices]
        width, parts = block_width(self.block, budget), [len(one.weight_OI) for one in matrices]
        weight_OI = torch.cat([one.weight_OI for one in matrices]) if len(matrices) > 1 else matrices[0].weight_OI
        if not self.bits and not any(self.planned(outputs, weight_OI.shape[1], budget) for outputs in parts):
            return [Edit.unchanged(one.weight_OI) for one in matrices]
        factor = stats.factor(self.damping)
        order_I = rose_order(weight_OI, factor, budget, width) if self.order == "rose" else None
        if order_I is not None:
            weight_OI = weight_OI[:, order_I]
            factor = reversed_cholesky(stats.gram_II[order_I][:, order_I], self.damping)
        grid = Grid.of(weight_OI, self.bits) if self.bits else None

        def solve(
            here: slice, current_BO: torch.Tensor, inverse_t_BB: torch.Tensor, pruned_BO: torch.Tensor
        ) -> torch.Tensor:
            return solve_block(current_BO, inverse_t_BB, pruned_BO, budget, grid, parts)

        edits = sweep(weight_OI, factor, width, solve).edits(parts)
        for edit in edits:
            if order_I is not None:
                back_I = order_I.argsort()
                edit.weight_OI, edit.pruned_OI = edit.weight_OI[:, back_I], edit.pruned_OI[:, back_I]
                edit.notes["order"] = "rose"
            if factor.damping != self.damping or factor.float64:
                edit.notes |= {"damping": factor.damping, "float64": factor.float64}
            if grid:
                # the sweep gives differences to the dense weights, which round
                edit.weight_OI = grid.nearest(edit.weight_OI.T).T
                edit.notes["grid"] = grid.notes()
        return edits


def rose_order(weight_OI: torch.Tensor, factor: Factor, budget: Budget, width: int) -> torch.Tensor | None:
    """The columns by what they stand to lose, most first; None where the blocks lose about the same.

    ROSE (2026), from its abstract: SparseGPT's mask is chosen once on the dense weights; the scores of what it
    removes are added up by block and by column, and where the block losses differ by more than `UNEVEN`, blocks
    and the columns inside them are taken in descending order. The columns of an N:M group move together.
    """
    inputs, unit = weight_OI.shape[1], max(budget.pattern.group, 1)
    # with U = inverse(R), U_jj = 1 / R_jj
    score_OI = (weight_OI * factor.r_t_II.diagonal()).square()
    blocks = [slice(start, min(start + width, inputs)) for start in range(0, inputs, width)]
    losses = [
        (score_OI[:, block] * masks.select(score_OI[:, block], budget, by="matrix")).sum(0).view(-1, unit).sum(1)
        for block in blocks
    ]
    total_B = torch.stack([loss_U.sum() for loss_U in losses])
    if float(total_B.max() - total_B.min()) <= UNEVEN * float(total_B.max()):
        return None
    columns_I = torch.arange(inputs, device=weight_OI.device)
    ordered = []
    for number in total_B.argsort(descending=True, stable=True).tolist():
        units_U = losses[number].argsort(descending=True, stable=True)
        ordered.append(columns_I[blocks[number]].view(-1, unit)[units_U].flatten())
    return torch.cat(ordered)
