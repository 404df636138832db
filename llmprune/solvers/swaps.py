"""Exchange kept and pruned weights of a row while that lowers the error."""

from __future__ import annotations

import torch

from llmprune.kernels.product import product_nt
from llmprune.linalg import Scaled
from llmprune.types import Budget

# candidates on each side whose every pair is tried
SHORTLIST = 8


def swaps(
    target_OI: torch.Tensor, pruned_OI: torch.Tensor, system: Scaled, budget: Budget, rounds: int = 32
) -> torch.Tensor:
    """A mask with the same count in each row (in each group for N:M) and no larger error.

    The error is that of the target with its pruned weights set to zero and no compensation,
    e H e' a row. Each round makes the best swap of every row among the `SHORTLIST` weights that are
    cheapest to prune and the `SHORTLIST` that gain most by their return, if it lowers the row's error.
    """
    weight_OI = target_OI * system.scale_I
    diagonal_I = system.matrix_II.diagonal()
    pruned_OI = pruned_OI.clone()
    rows_O = torch.arange(len(weight_OI), device=weight_OI.device)
    if budget.pattern.structured:
        return _swaps_in_groups(weight_OI, pruned_OI, system.matrix_II, budget.pattern.group, rounds)
    # a row with fewer candidates has them filled up with ones of infinite cost
    shortlist = min(SHORTLIST, weight_OI.shape[1])
    pressure_OI = product_nt(weight_OI * pruned_OI, system.matrix_II)
    for _ in range(rounds):
        prune_OI = 2 * weight_OI * pressure_OI + weight_OI.square() * diagonal_I
        regrow_OI = -2 * weight_OI * pressure_OI + weight_OI.square() * diagonal_I
        p_OK = prune_OI.masked_fill(pruned_OI, torch.inf).topk(shortlist, 1, largest=False)
        q_OK = regrow_OI.masked_fill(~pruned_OI, torch.inf).topk(shortlist, 1, largest=False)
        both_OKK = weight_OI.gather(1, p_OK.indices)[:, :, None] * weight_OI.gather(1, q_OK.indices)[:, None, :]
        cross_OKK = system.matrix_II[p_OK.indices[:, :, None], q_OK.indices[:, None, :]]
        change_OKK = p_OK.values[:, :, None] + q_OK.values[:, None, :] - 2 * both_OKK * cross_OKK
        best_O, place_O = change_OKK.flatten(1).min(1)
        better = rows_O[best_O < 0]
        if not len(better):
            break
        p = p_OK.indices[better, place_O[better] // shortlist]
        q = q_OK.indices[better, place_O[better] % shortlist]
        pruned_OI[better, p] = True
        pruned_OI[better, q] = False
        pressure_OI[better] += weight_OI[better, p][:, None] * system.matrix_II[p]
        pressure_OI[better] -= weight_OI[better, q][:, None] * system.matrix_II[q]
    return pruned_OI


def _swaps_in_groups(
    weight_OI: torch.Tensor, pruned_OI: torch.Tensor, matrix_II: torch.Tensor, group: int, rounds: int
) -> torch.Tensor:
    """The same, where both sides of a swap lie in one group of inputs: the best group of every row, each round."""
    rows_O = torch.arange(len(weight_OI), device=weight_OI.device)
    starts_G = torch.arange(0, weight_OI.shape[1], group, device=weight_OI.device)
    members_GM = starts_G[:, None] + torch.arange(group, device=weight_OI.device)
    blocks_GMM = matrix_II[members_GM[:, :, None], members_GM[:, None, :]]
    weight_OGM = weight_OI.unflatten(1, (-1, group))
    both_OGMM = 2 * weight_OGM[..., :, None] * weight_OGM[..., None, :] * blocks_GMM
    own_OGM = weight_OGM.square() * blocks_GMM.diagonal(dim1=1, dim2=2)
    pressure_OI = product_nt(weight_OI * pruned_OI, matrix_II)
    for _ in range(rounds):
        pressure_OGM = 2 * weight_OGM * pressure_OI.unflatten(1, (-1, group))
        pruned_OGM = pruned_OI.unflatten(1, (-1, group))
        prune_OGM = (own_OGM + pressure_OGM).masked_fill(pruned_OGM, torch.inf)
        regrow_OGM = (own_OGM - pressure_OGM).masked_fill(~pruned_OGM, torch.inf)
        change_OGMM = prune_OGM[..., :, None] + regrow_OGM[..., None, :] - both_OGMM
        best_O, place_O = change_OGMM.flatten(1).min(1)
        better = rows_O[best_O < 0]
        if not len(better):
            break
        start = place_O[better] // group**2 * group
        p = start + place_O[better] // group % group
        q = start + place_O[better] % group
        pruned_OI[better, p] = True
        pruned_OI[better, q] = False
        pressure_OI[better] += weight_OI[better, p][:, None] * matrix_II[p]
        pressure_OI[better] -= weight_OI[better, q][:, None] * matrix_II[q]
    return pruned_OI
