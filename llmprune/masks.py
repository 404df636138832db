"""Selection of what to prune: the only top-k and N:M code of the project.

Exact counts always; ties go to the lowest index, so a mask depends on nothing but the scores.
"""

from __future__ import annotations

import torch

from llmprune.types import Budget


def lowest(scores_GN: torch.Tensor, count: int) -> torch.Tensor:
    """Mark the `count` lowest scores of every row of `scores_GN`.

    Returns a bool tensor of the same shape with exactly `count` True values a row.
    """
    if count == 0:
        return torch.zeros_like(scores_GN, dtype=torch.bool)
    threshold_G1 = _kth_lowest(scores_GN, count)
    below_GN = scores_GN < threshold_G1
    tied_GN = scores_GN == threshold_G1
    missing_G1 = count - below_GN.sum(1, keepdim=True)
    if bool((tied_GN.sum(1, keepdim=True) == missing_G1).all()):
        return below_GN | tied_GN
    return below_GN | (tied_GN & (tied_GN.cumsum(1) <= missing_G1))


def lowest_per_group(scores_OI: torch.Tensor, keep: int, group: int) -> torch.Tensor:
    """Mark the `group - keep` lowest scores of every `group` consecutive inputs (N:M), as bool O x I."""
    scores_ONM = scores_OI.unflatten(1, (-1, group))
    # rank by pairwise comparison: cheaper than sorting tiny groups, and stable by construction
    rank = torch.zeros_like(scores_ONM, dtype=torch.int16)
    for i in range(group):
        for j in range(i):
            first_wins = scores_ONM[..., j] <= scores_ONM[..., i]
            rank[..., i] += first_wins
            rank[..., j] += ~first_wins
    return (rank < group - keep).flatten(1)


def select(scores_OI: torch.Tensor, budget: Budget, *, by: str) -> torch.Tensor:
    """Choose what to prune, as bool O x I: N:M if the budget says so, else the lowest `by` "matrix" or "row"."""
    if budget.pattern.structured:
        return lowest_per_group(scores_OI, budget.pattern.keep, budget.pattern.group)
    if by == "row":
        return lowest(scores_OI, budget.pruned_of(scores_OI.shape[1]))
    return lowest(scores_OI.reshape(1, -1), budget.pruned_of(scores_OI.numel())).view_as(scores_OI)


def _kth_lowest(scores_GN: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th lowest score of each row, as G x 1."""
    if scores_GN.device.type == "cpu" and scores_GN.dtype in (torch.float32, torch.float64):
        # numpy's vectorised partition is ten times as fast as torch.kthvalue on CPU
        import numpy

        return torch.from_numpy(numpy.partition(scores_GN.numpy(), k - 1, axis=1)[:, k - 1 : k].copy())
    return scores_GN.kthvalue(k, dim=1, keepdim=True).values
