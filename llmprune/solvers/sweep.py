"""The sweep over blocks of columns in which the columns to come make up for what is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from llmprune.kernels.product import product_nt
from llmprune.kernels.sparsegpt_block import solve_block
from llmprune.linalg import Factor, Scaled
from llmprune.types import Budget, Edit

# Solves a block in place: the columns it covers, its weights (transposed), the block U' of the inverse factor
# (lower triangular) and the mask, which it fills; returns the increase of the damped loss by output, in float64.
BlockSolver = Callable[[slice, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Swept:
    """New weights, what is pruned, and the diagonal of dW G dW' in float64, without the damping's share."""

    weight_OI: torch.Tensor
    pruned_OI: torch.Tensor
    loss_O: torch.Tensor

    def edits(self, parts: Sequence[int]) -> list[Edit]:
        """What becomes of the matrices whose outputs these are, so many each."""
        pieces = (one.split(list(parts)) for one in (self.weight_OI, self.pruned_OI, self.loss_O))
        return [
            Edit(weight, pruned, loss=max(float(loss.sum()), 0.0)) for weight, pruned, loss in zip(*pieces, strict=True)
        ]


def block_width(block: int, budget: Budget) -> int:
    """`block` columns, rounded down so that no N:M group straddles two blocks."""
    group = max(budget.pattern.group, 1)
    return max(block // group, 1) * group


def planned_by_block(outputs: int, inputs: int, block: int, budget: Budget) -> int:
    """How many weights go if every block of columns loses its exact share."""
    width = block_width(block, budget)
    return sum(budget.pruned_of(outputs * min(width, inputs - start)) for start in range(0, inputs, width))


def sweep(weight_OI: torch.Tensor, factor: Factor, width: int, solve: BlockSolver) -> Swept:
    """Solve blocks of `width` columns from left to right, each on weights that carry the blocks before it.

    Left-looking: with H = R R' and U = inverse(R), a block's weights are the dense ones plus
    `inverse(R_BB) R_t[B, :start] change[:start]`, so that every finished column is read instead of every later
    one rewritten, and only the diagonal blocks of R are inverted.
    """
    # columns are processed one after the other: transposed, each is contiguous
    dense_IO = weight_OI.T.contiguous()
    change_IO = torch.zeros_like(dense_IO)
    pruned_IO = torch.zeros_like(dense_IO, dtype=torch.bool)
    loss_O = torch.zeros(len(weight_OI), dtype=torch.float64, device=weight_OI.device)
    for start in range(0, len(dense_IO), width):
        here = slice(start, min(start + width, len(dense_IO)))
        r_t_BB = factor.r_t_II[here, here]
        inverse_t_BB = torch.linalg.solve_triangular(r_t_BB, torch.eye(len(r_t_BB), device=r_t_BB.device), upper=False)
        current_BO = dense_IO[here].clone()
        if start:
            carried_BO = product_nt(factor.r_t_II[here, :start], change_IO[:start].T)
            current_BO.addmm_(inverse_t_BB, carried_BO)
        loss_O += solve(here, current_BO, inverse_t_BB, pruned_IO[here])
        torch.sub(dense_IO[here], current_BO, out=change_IO[here])
    loss_O -= factor.shift * torch.sum(change_IO.square(), dim=0, dtype=torch.float64)
    swept_IO = torch.sub(dense_IO, change_IO, out=change_IO)
    return Swept(swept_IO.T, pruned_IO.T, loss_O)


def sweep_mask(target_OI: torch.Tensor, pruned_OI: torch.Tensor, system: Scaled, width: int = 128) -> torch.Tensor:
    """The weights that SparseGPT's sweep gives to a mask that is already chosen."""

    def solve(
        here: slice, current_BO: torch.Tensor, inverse_t_BB: torch.Tensor, pruned_BO: torch.Tensor
    ) -> torch.Tensor:
        pruned_BO.copy_(pruned_OI[:, here].T)
        return solve_block(current_BO, inverse_t_BB, pruned_BO, None)

    return sweep(target_OI * system.scale_I, system.factor, width, solve).weight_OI / system.scale_I
