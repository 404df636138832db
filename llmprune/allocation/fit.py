"""From a wish for every matrix to amounts that add up to the budget."""

from __future__ import annotations

from collections.abc import Callable

import torch

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

    `wish(level)` gives a sparsity for every matrix that grows steadily with `level`; see `counts`. Raises UserError if
    the clamped wishes cannot reach the budget.
    """
    sizes_N = torch.tensor([spec.count for spec in specs], dtype=torch.float64)

    def wished(level: float) -> torch.Tensor:
        found = wish(level)
        return torch.tensor([found[spec.name] for spec in specs], dtype=torch.float64)

    found_N = counts(sizes_N, budget.pruned_of(int(sizes_N.sum())), wished)
    return {spec.name: Budget(count / spec.count) for spec, count in zip(specs, found_N.tolist(), strict=True)}


def stretched(figures: list[float], width: float) -> list[float]:
    """Figures moved and scaled so that they reach from 0 to `width`; all 0 where they are alike."""
    low, high = min(figures), max(figures)
    spread = high - low or 1.0
    return [width * (one - low) / spread for one in figures]


def counts(sizes_N: torch.Tensor, target: int, wish: Callable[[float], torch.Tensor]) -> torch.Tensor:
    """How many of each of N sets go, `target` in all and at most `MOST` of any one, as int64.

    `wish(level)` gives a share for every set that grows steadily with `level`; the level is found by bisection, with
    every wish clamped and weighted by the size of its set. What rounding leaves over goes to the largest remainders,
    ties to the first. Raises UserError if the clamped wishes cannot reach the target.
    """

    def amounts(level: float) -> torch.Tensor:
        return wish(level).clamp(0.0, MOST) * sizes_N

    low, high = -2.0, 2.0
    while float(amounts(high).sum()) < target:
        low, high = high, 2 * high
        if high > 2.0**60:
            raise UserError(
                f"sparsity {target / float(sizes_N.sum()):.3g} is out of reach: no matrix may lose more than {MOST:.0%}"
            )
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if float(amounts(middle).sum()) >= target else (middle, high)
    found_N = amounts(high)
    whole_N = found_N.floor().to(torch.int64)
    order_N = (whole_N - found_N).argsort(stable=True)
    whole_N[order_N[: target - int(whole_N.sum())]] += 1
    return whole_N
