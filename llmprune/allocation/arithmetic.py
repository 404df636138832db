"""Sparsity that grows with depth by equal steps."""

from __future__ import annotations

from llmprune.allocation import Dense
from llmprune.allocation.fit import fit, refuse_pattern
from llmprune.types import Budget

# How much sparser the last layer is than the first: chosen among 0.05, 0.1 and 0.2 with SparseGPT at 70 % on text held
# out from the calibration text of two small models.
RISE = 0.05


def arithmetic(dense: Dense, budget: Budget) -> dict[str, Budget]:
    """ATP, the arithmetic progression of Huang et al. 2025 (arXiv:2502.14770), with a fixed slope.

    The authors tune the slope by a few trials; here the sparsity rises by `RISE` in all from the first layer to the
    last. Needs neither text nor weights. Raises UserError for an N:M pattern.
    """
    refuse_pattern("arithmetic", budget)
    steps = max(len(dense.layers) - 1, 1)
    rise = dense.by_layer([RISE * number / steps for number in range(len(dense.layers))])
    return fit(dense.specs, budget, lambda level: {name: level + one for name, one in rise.items()})
