"""Matrices whose outputs suffer more keep more."""

from __future__ import annotations

from llmprune.allocation import Dense, Measured
from llmprune.allocation.fit import fit, refuse_pattern
from llmprune.linalg import output_energy
from llmprune.methods.weight.wanda import Wanda
from llmprune.statistics import GRAM
from llmprune.types import Budget, Matrix


def error(dense: Dense, budget: Budget) -> dict[str, Budget]:
    """Sparsity in proportion to 1 - E / sum of E, E the relative output error of a matrix under Wanda at the budget.

    After "LSA", layer-wise sparsity by measured reconstruction error, as far as its abstract tells. E is measured
    on the dense model's inputs, all matrices at the same amount. A matrix that no token reached counts as
    having no error. Raises UserError for an N:M pattern.
    """
    refuse_pattern("error", budget)
    lost = {spec.name: 0.0 for spec in dense.specs}

    def look(number: int, matrices: Measured) -> None:
        for spec, weight_OI, stats in matrices():
            change_OI = Wanda().solve(Matrix(spec.name, weight_OI), stats, budget).weight_OI - weight_OI
            whole = output_energy(weight_OI, stats.gram_lower_II)
            lost[spec.name] = output_energy(change_OI, stats.gram_lower_II) / whole if whole > 0 else 0.0

    dense.measure(frozenset({GRAM}), look)
    total = sum(lost.values()) or 1.0
    return fit(dense.specs, budget, lambda level: {name: level * (1 - one / total) for name, one in lost.items()})
