"""Layers whose typical weights matter little beside their outliers keep less, without a threshold for outliers."""

from __future__ import annotations

import torch

from llmprune import scores
from llmprune.allocation import Dense, Measured
from llmprune.allocation.fit import fit, refuse_pattern, stretched
from llmprune.statistics import MOMENTS
from llmprune.types import Budget, Matrix

REACH = 0.1  # the sparsest layer is twice this above the densest


def dlp(dense: Dense, budget: Budget) -> dict[str, Budget]:
    """DLP, Chen et al. 2025 (arXiv:2505.23807): the median of a layer's Wanda scores is how unimportant the layer is.

    Sparsity grows linearly with a layer's share of the sum of all medians, over a range of 2 * `REACH`. The rule is
    known from the abstract and from summaries only, and the range is this project's own. Holds the scores of one
    layer. Raises UserError for an N:M pattern.
    """
    refuse_pattern("dlp", budget)
    median = [0.0] * len(dense.layers)

    def look(number: int, matrices: Measured) -> None:
        found = [scores.wanda(Matrix(spec.name, weight_OI), stats).flatten() for spec, weight_OI, stats in matrices()]
        if found:
            median[number] = float(torch.cat(found).median())

    dense.measure(frozenset({MOMENTS}), look)
    lead = dense.by_layer(stretched(median, 2 * REACH))
    return fit(dense.specs, budget, lambda level: {name: level + one for name, one in lead.items()})
