"""Layers with many outlying weights keep more."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from llmprune import scores
from llmprune.allocation import Dense, Measured
from llmprune.allocation.fit import fit, refuse_pattern, stretched
from llmprune.statistics import MOMENTS
from llmprune.types import Budget, Matrix

OUTLYING = 5.0  # times the layer's mean score
REACH = 0.08  # the sparsest layer is twice this above the densest


def owl(dense: Dense, budget: Budget) -> dict[str, Budget]:
    """Yin et al. 2024, "Outlier Weighed Layerwise Sparsity" (arXiv:2310.05175), equations 2 and 3.

    A layer's share of outliers is that of the Wanda scores of all its matrices above `OUTLYING` times their mean, in
    the dense model. Sparsity falls linearly with it, over a range of 2 * `REACH`. Layers that are all alike get the
    same amount. Raises UserError for an N:M pattern.
    """
    refuse_pattern("owl", budget)
    share = [0.0] * len(dense.layers)

    def look(number: int, matrices: Measured) -> None:
        def each() -> Iterator[torch.Tensor]:
            return (scores.wanda(Matrix(spec.name, weight_OI), stats) for spec, weight_OI, stats in matrices())

        count = max(sum(score_OI.numel() for score_OI in each()), 1)
        limit = OUTLYING * sum(float(score_OI.sum(dtype=torch.float64)) for score_OI in each()) / count
        above = sum(int((score_OI > limit).sum()) for score_OI in each())
        share[number] = above / count

    dense.measure(frozenset({MOMENTS}), look)
    lead = dense.by_layer(stretched(share, 2 * REACH))
    return fit(dense.specs, budget, lambda level: {name: level - one for name, one in lead.items()})
