"""The column sweep of SparseGPT inside one block of columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmprune import masks
from llmprune.grid import Grid
from llmprune.kernels import dispatch
from llmprune.kernels.product import product_nt
from llmprune.types import Budget

# Columns swept one by one before the rest of the block is brought up to date with one product.
STEP = 32


def solve_block(
    current_BO: torch.Tensor,
    inverse_t_BB: torch.Tensor,
    pruned_BO: torch.Tensor,
    budget: Budget | None,
    grid: Grid | None = None,
    parts: Sequence[int] = (),
) -> torch.Tensor:
    """Prune the rows of `current_BO` (B columns of the matrix, transposed) in order, in place.

    `inverse_t_BB`: the transposed block U' of the inverse factor, lower triangular. `pruned_BO`
    receives the mask, or holds it already where there is no `budget`. With a `grid`, kept weights are rounded
    to it, and later columns make up for that too. Returns, for each output in float64, the sum of e^2 with
    e = (w - new w) / U_jj, which is the increase of the damped loss. Unstructured masks are chosen for the whole
    block at once, N:M masks just before each group, both on weights that already carry the compensation.
    `parts`: where the outputs are those of several matrices, how many each has; each loses its own share.
    """
    if budget and not budget.pattern.structured:
        score_BO = (current_BO / inverse_t_BB.diagonal()[:, None]).square()
        sizes = list(parts) or [current_BO.shape[1]]
        for score_BP, pruned_BP in zip(score_BO.split(sizes, 1), pruned_BO.split(sizes, 1), strict=True):
            pruned_BP.copy_(masks.select(score_BP.T, budget, by="matrix").T)
    by_group = budget if budget and budget.pattern.structured else Budget(0.0)
    if grid:
        return solve_block_torch(current_BO, inverse_t_BB, pruned_BO, by_group, grid)
    loss_O: torch.Tensor = dispatch.run("sparsegpt_block", current_BO, inverse_t_BB, pruned_BO, by_group)
    return loss_O


def solve_block_torch(
    current_BO: torch.Tensor,
    inverse_t_BB: torch.Tensor,
    pruned_BO: torch.Tensor,
    budget: Budget,
    grid: Grid | None = None,
) -> torch.Tensor:
    """The sweep itself: an N:M mask is chosen group by group, any other is there already."""
    width = len(current_BO)
    diagonal_B1 = inverse_t_BB.diagonal()[:, None]
    group = budget.pattern.group
    loss_O = torch.zeros(current_BO.shape[1], dtype=torch.float64, device=current_BO.device)
    step = group or STEP
    for start in range(0, width, step):
        end = min(start + step, width)
        if group:
            score_SO = (current_BO[start:end] / diagonal_B1[start:end]).square()
            pruned_BO[start:end] = masks.select(score_SO.T, budget, by="row").T
        error_SO = torch.empty_like(current_BO[start:end])
        for column in range(start, end):
            error_O = torch.mul(current_BO[column], pruned_BO[column], out=error_SO[column - start])
            if grid:
                rounded_O = grid.nearest(current_BO[column])
                error_O += (current_BO[column] - rounded_O).masked_fill_(pruned_BO[column], 0)
                current_BO[column] = rounded_O
            error_O /= diagonal_B1[column]
            if column + 1 < end:
                current_BO[column + 1 : end].addr_(inverse_t_BB[column + 1 : end, column], error_O, alpha=-1)
        if end < width:
            current_BO[end:].sub_(product_nt(inverse_t_BB[end:, start:end], error_SO.T))
        current_BO[start:end].masked_fill_(pruned_BO[start:end], 0)
        loss_O += torch.sum(error_SO.square(), dim=0, dtype=torch.float64)
    return loss_O
