"""Many small systems that share one matrix: each row has its own subset of equations and unknowns."""

from __future__ import annotations

import torch

from llmprune.linalg import Scaled
from llmprune.types import RunError

# elements of the gathered systems that are held at once: 64 MiB in float32
ELEMENTS = 1 << 24


def solve_subsets(matrix_II: torch.Tensor, chosen_OI: torch.Tensor, right_OI: torch.Tensor) -> torch.Tensor:
    """For every row, x with `matrix[S, S] x_S = right_S` for its chosen indices S, and zero elsewhere.

    Batched Cholesky, in the dtype of the operands; subsets of unequal size are padded with the identity.
    Costs O * k^3 / 3 multiplications for subsets of k. Raises RunError if a system is not positive definite.
    """
    solved_OI = torch.zeros_like(right_OI)
    longest = int(chosen_OI.sum(1).max())
    if longest == 0:
        return solved_OI
    for rows in torch.arange(len(right_OI), device=right_OI.device).split(max(ELEMENTS // longest**2, 1)):
        chosen_RK, index_RK = chosen_OI[rows].to(torch.int8).topk(longest, dim=1)
        real_RK = chosen_RK > 0
        system_RKK = matrix_II[index_RK[:, :, None], index_RK[:, None, :]]
        system_RKK *= real_RK[:, :, None] & real_RK[:, None, :]
        system_RKK.diagonal(dim1=1, dim2=2).add_((~real_RK).to(system_RKK.dtype))
        lower_RKK, info_R = torch.linalg.cholesky_ex(system_RKK)
        if bool(info_R.any()):
            raise RunError("the damped Gram matrix of a row is not positive definite; raise `damping`")
        right_RK = right_OI[rows].gather(1, index_RK) * real_RK
        answer_RK = torch.cholesky_solve(right_RK[..., None], lower_RKK)[..., 0]
        solved_OI[rows] = torch.zeros_like(right_OI[rows]).scatter_(1, index_RK, answer_RK)
    return solved_OI


def exact(target_OI: torch.Tensor, pruned_OI: torch.Tensor, system: Scaled) -> torch.Tensor:
    """What `least_squares` approaches, by factoring every row's own system in float64.

    Exact, and some ten times as slow on a CPU: for rows of a few hundred kept inputs.
    """
    goal_OI = (target_OI * system.scale_I).double()
    matrix_II = system.matrix_II.double()
    return (solve_subsets(matrix_II, ~pruned_OI, goal_OI @ matrix_II) / system.scale_I).float()
