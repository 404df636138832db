"""From a wish for every matrix to amounts that add up to the budget."""

from __future__ import annotations

import math
from collections.abc import Callable

from llmprune.types import Budget, MatrixSpec, UserError

MOST = 0.99  # no matrix loses more than this share of its weights
HALVINGS = 100


def refuse_pattern(name: str, budget: Budget) -> None:
    """Raises UserError for an N:M pattern, which fixes the amount of every matrix."""
    if budget.pattern.structured:
        raise UserError(
            f"allocation {name!r} needs a sparsity: the pattern {budget.pattern} fixes every matrix's amount"
        )


def fit(specs: list[MatrixSpec], budget: Budget, wish: Callable[[float], dict[str, float]]) -> dict[str, Budget]:
    """Amounts with exactly the zeros of `budget` in all, each between 0 and `MOST`.

    `wish(level)` gives a sparsity for every matrix that grows steadily with `level`; the level is found by bisection, with
    every wish clamped and weighted by the size of its matrix. What rounding leaves over goes to the largest
    remainders. Raises UserError if the clamped wishes cannot reach the budget.
    """
    target = budget.pruned_of(sum(spec.count for spec in specs))

    def amounts(level: float) -> list[float]:
        wished = wish(level)
        return [min(max(wished[spec.name], 0.0), MOST) * spec.count for spec in specs]

    low, high = -2.0, 2.0
    while math.fsum(amounts(high)) < target:
        low, high = high, 2 * high
        if high > 2.0**60:
            raise UserError(f"sparsity {budget.sparsity} is out of reach: no matrix may lose more than {MOST:.0%}")
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if math.fsum(amounts(middle)) >= target else (middle, high)
    found = amounts(high)
    counts = [math.floor(one) for one in found]
    order = sorted(range(len(specs)), key=lambda index: counts[index] - found[index])
    for index in order[: target - sum(counts)]:
        counts[index] += 1
    return {spec.name: Budget(count / spec.count) for spec, count in zip(specs, counts, strict=True)}
