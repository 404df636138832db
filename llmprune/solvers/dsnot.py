"""Dynamic sparse no training: exchange weights until a row's expected output is what it was."""

from __future__ import annotations

import torch

from llmprune.statistics import Stats
from llmprune.types import Pattern

TINY = torch.finfo(torch.float32).tiny
# the authors' own: exchanges a row, and a residual of 0.1 summed over the 2048 tokens of a sequence, as a mean
CYCLES = 50
THRESHOLD = 0.1 / 2048


def dsnot(
    weight_OI: torch.Tensor, pruned_OI: torch.Tensor, stats: Stats, pattern: Pattern, *, cycles: int, threshold: float
) -> torch.Tensor:
    """A mask with the same count in each row (in each group for N:M) and no larger expected residual.

    The residual of a row is the mean of the output that it loses, sum of w_j mean(x_j) over its pruned inputs
    (Zhang et al. 2023, arXiv:2310.08915, section 3). In each of `cycles`, every row whose residual is above
    `threshold` in size and has not changed its sign regrows the pruned weight with the largest
    w_j mean(x_j) / var(x_j) in the residual's direction, and prunes the kept weight with the lowest |w_j| ||x_j|| of
    those that pull the residual back. Deviation: a row stops where the exchange would not make its residual smaller.
    """
    pruned_OI = pruned_OI.clone()
    lost_OI = weight_OI * stats.mean_I
    gain_OI = lost_OI / stats.variance_I.clamp_min(TINY)
    price_OI = weight_OI.abs() * stats.square_sums_I.sqrt()
    residual_O = (lost_OI * pruned_OI).sum(1)
    sign_O1 = residual_O.sign()[:, None]
    rows_O = torch.arange(len(weight_OI), device=weight_OI.device)
    for _ in range(cycles):
        grow_OI = (gain_OI * sign_O1).masked_fill(~pruned_OI, -torch.inf)
        price_now_OI = price_OI.masked_fill(pruned_OI | (lost_OI * sign_O1 >= 0), torch.inf)
        if pattern.structured:
            # a group can exchange only if it holds such a kept weight
            able_OG = price_now_OI.unflatten(1, (-1, pattern.group)).isfinite().any(2)
            grow_OI.masked_fill_(~able_OG.repeat_interleave(pattern.group, 1), -torch.inf)
        q_O = grow_OI.argmax(1)
        if pattern.structured:
            group_I = torch.arange(weight_OI.shape[1], device=weight_OI.device) // pattern.group
            price_now_OI.masked_fill_(group_I != group_I[q_O][:, None], torch.inf)
        p_O = price_now_OI.argmin(1)
        new_O = residual_O - lost_OI[rows_O, q_O] + lost_OI[rows_O, p_O]
        possible_O = grow_OI[rows_O, q_O].isfinite() & price_now_OI[rows_O, p_O].isfinite()
        wanted_O = (residual_O.abs() > threshold) & (residual_O * sign_O1[:, 0] > 0)
        rows = rows_O[possible_O & wanted_O & (new_O.abs() < residual_O.abs())]
        if not len(rows):
            break
        pruned_OI[rows, q_O[rows]] = False
        pruned_OI[rows, p_O[rows]] = True
        residual_O[rows] = new_O[rows]
    return pruned_OI
