"""One threshold for the scores of the whole model decides how much each matrix loses."""

from __future__ import annotations

import torch

from llmprune.allocation import Dense, Values
from llmprune.allocation.fit import refuse_pattern
from llmprune.types import Budget

_LOW_BITS = 16


def global_score(dense: Dense, budget: Budget) -> dict[str, Budget]:
    """Amounts under which pruning by a score per matrix is pruning by it in the model as a whole.

    The score is the method's own where it is one of the loss (gradients), or needs no inputs, else |w|. The k-th
    smallest is found exactly by radix selection over the float32 bit patterns: two passes over the scores and two
    histograms, whatever the size of the model. Ties at the threshold go to the matrices in model order. A matrix without
    a score, whose inputs no token reached, gets the budget itself. Raises UserError for an N:M pattern, which fixes the
    amount of every matrix.
    """
    refuse_pattern("global", budget)
    specs, scores = dense.specs, dense.scores
    amounts = dict.fromkeys((spec.name for spec in specs), budget)
    if budget.pruned_of(sum(spec.count for spec in specs)) == 0:
        return amounts
    counts = _histogram(scores, None)
    high, left = _bucket(counts, budget.pruned_of(int(counts.sum())))
    low, left = _bucket(_histogram(scores, high), left)
    threshold = high << _LOW_BITS | low
    for spec, score_OI in scores():
        bits = _bits(score_OI)
        ties = min(int((bits == threshold).sum()), left)
        left -= ties
        amounts[spec.name] = Budget((int((bits < threshold).sum()) + ties) / spec.count)
    return amounts


def _bits(score_OI: torch.Tensor) -> torch.Tensor:
    """Integers from 0 to 2^32 - 1 in the order of the scores."""
    # adding zero makes -0 and 0 one
    bits = (score_OI.float().contiguous() + 0.0).view(torch.int32).reshape(-1)
    # negative floats have the sign bit set, and the larger their size the larger the rest
    return torch.where(bits < 0, ~(bits & 0x7FFFFFFF), bits).to(torch.int64) + (1 << 31)


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
