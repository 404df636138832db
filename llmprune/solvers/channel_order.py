"""An order of the inputs in which an N:M pattern keeps more of what matters."""

from __future__ import annotations

import torch

from llmprune.solvers.assignment import assign

# groups among which inputs are assigned at once: the assignment is cubic in them
TOGETHER = 256


def retained(score_OI: torch.Tensor, keep: int, group: int) -> float:
    """The sum of the scores that stay if the `keep` highest of every `group` inputs do."""
    return float(score_OI.unflatten(1, (-1, group)).topk(keep, dim=2).values.sum(dtype=torch.float64))


def channel_order(score_OI: torch.Tensor, keep: int, group: int) -> torch.Tensor:
    """The inputs in a new order, such that `retained` of the scores in it is at least as much.

    RIA's channel permutation (Zhang et al. 2024, openreview:Tr0lPx9woF, section 3.2): inputs are dealt out to groups by
    their total score, one group after the other and back; then, for each place in a group, the inputs in that
    place are assigned anew to the groups so that most is retained, exactly for at most `TOGETHER` groups at a time.
    The same is done to the given order, and the better of the two taken. Needs the scores and `TOGETHER`² sums of O
    terms for each part.
    """
    inputs = score_OI.shape[1]
    ranked_I = score_OI.sum(0, dtype=torch.float64).argsort(descending=True, stable=True)
    dealt_MG = ranked_I.view(group, inputs // group)
    dealt_MG[1::2] = dealt_MG[1::2].flip(1)
    given_GM = torch.arange(inputs, device=score_OI.device).view(-1, group)
    orders = [_refined(score_OI, start_GM, keep) for start_GM in (given_GM, dealt_MG.T.contiguous())]
    return max(orders, key=lambda order_I: retained(score_OI[:, order_I], keep, group))


def _refined(score_OI: torch.Tensor, order_GM: torch.Tensor, keep: int) -> torch.Tensor:
    for part_GM in order_GM.split(TOGETHER):
        for place in range(part_GM.shape[1]):
            part_GM[:, place] = part_GM[_assigned(score_OI, part_GM, place, keep), place]
    return order_GM.flatten()


def _assigned(score_OI: torch.Tensor, order_GM: torch.Tensor, place: int, keep: int) -> torch.Tensor:
    """For every group, from which of the groups the input in `place` should come."""
    others_GM = torch.cat([order_GM[:, :place], order_GM[:, place + 1 :]], 1)
    # an input adds what it has beyond the least that the others of the group would keep
    least_OG = score_OI[:, others_GM].topk(keep, dim=2).values[:, :, -1]
    moved_OG = score_OI[:, order_GM[:, place]]
    gain_GG = torch.stack([(moved_OG - least_O1).clamp_min(0).sum(0) for least_O1 in least_OG.T[:, :, None]])
    return assign(gain_GG).to(order_GM.device)
