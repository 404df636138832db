"""One threshold for the scores of the whole model decides how much each matrix loses."""

from __future__ import annotations

import torch

from llmprune.allocation import Dense, Values
from llmprune.allocation.fit import refuse_pattern
from llmprune.types import Budget

_LOW_BITS = 16


def global_score(dense: Dense, budget: Budget) -> dict[str, Budget]:
    """Amounts under which pruning by a score per matrix is pruning by it in the model as a whole.

    The score is the method's own where it needs no inputs (magnitude, and those of gradients), else |w|. The k-th
    smallest is found exactly by radix selection over the float32 bit patterns, whose
    order is that of the values: two passes over the scores and two histograms, whatever the size
    of the model. Ties at the threshold go to the matrices in model order. Raises UserError for an
    N:M pattern, which fixes the amount of every matrix.
    """
    refuse_pattern("global", budget)
    specs, scores = dense.specs, dense.scores
    left = budget.pruned_of(sum(spec.count for spec in specs))
    if left == 0:
        return dict.fromkeys((spec.name for spec in specs), Budget(0.0))
    high, left = _bucket(_histogram(scores, None), left)
    low, left = _bucket(_histogram(scores, high), left)
    threshold = high << _LOW_BITS | low
    amounts = {}
    for spec, score_OI in scores():
        bits = _bits(score_OI)
        ties = min(int((bits == threshold).sum()), left)
        left -= ties
        amounts[spec.name] = Budget((int((bits < threshold).sum()) + ties) / spec.count)
    return amounts


def _bits(score_OI: torch.Tensor) -> torch.Tensor:
    return score_OI.contiguous().view(torch.int32).reshape(-1)


def _histogram(scores: Values, high: int | None) -> torch.Tensor:
    """Counts of the upper halves of the bit patterns, or of the lower halves where the upper one is `high`."""
    counts = torch.zeros(1 << _LOW_BITS, dtype=torch.int64)
    for _, score_OI in scores():
        bits = _bits(score_OI)
        if high is not None:
            bits = bits[bits >> _LOW_BITS == high] & (1 << _LOW_BITS) - 1
        else:
            bits = bits >> _LOW_BITS
        counts += torch.bincount(bits.cpu(), minlength=1 << _LOW_BITS)
    return counts


def _bucket(counts: torch.Tensor, rank: int) -> tuple[int, int]:
    """The bucket that holds the `rank`-th smallest (from 1), and its rank inside that bucket."""
    cumulative = counts.cumsum(0)
    bucket = int(torch.searchsorted(cumulative, rank))
    return bucket, rank - int(cumulative[bucket] - counts[bucket])
