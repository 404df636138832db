"""The amounts with the least error in all, from a database of what every matrix loses at every level."""

from __future__ import annotations

import math

import numpy as np

from llmprune.allocation import Dense, Measured
from llmprune.allocation.fit import MOST, fit, refuse_pattern
from llmprune.linalg import output_energy
from llmprune.methods.weight.sparsegpt import SparseGPT
from llmprune.statistics import GRAM
from llmprune.types import Budget, Matrix, UserError

KEPT = 0.8  # the density of a level, as a share of that of the level before
BUCKETS = 10_000  # into which the zeros are divided, at least
FINE = 4  # of them for each matrix, at least


def dynamic(dense: Dense, budget: Budget) -> dict[str, Budget]:
    """OBC's level database and dynamic programme (Frantar and Alistarh 2022, arXiv:2208.11580, section 6).

    Every matrix is pruned by SparseGPT on the dense model's inputs to levels from 0 to 99 %, and one level a matrix is
    chosen so that the sum of their errors is least and the zeros are at least those of the budget; all amounts are then
    lowered alike to the exact budget. Deviations: an error is the share of its outputs' energy that a matrix loses, for
    energies of different matrices do not compare; a density is 0.8, not 0.9 of the one before. Solves every matrix some
    twenty times. One that no token reached gets the level next to the budget. Raises UserError for an N:M pattern.
    """
    refuse_pattern("dynamic", budget)
    levels = _levels()
    beside = min(range(len(levels)), key=lambda place: abs(levels[place] - budget.sparsity))
    unreached = np.where(np.arange(len(levels)) == beside, 0.0, np.inf)
    errors = {spec.name: unreached for spec in dense.specs}

    def look(number: int, matrices: Measured) -> None:
        for spec, weight_OI, stats in matrices():
            whole = output_energy(weight_OI, stats.gram_lower_II)
            edits = (SparseGPT().solve(Matrix(spec.name, weight_OI), stats, Budget(level)) for level in levels)
            errors[spec.name] = np.array([(edit.loss or 0.0) / whole if whole > 0 else 0.0 for edit in edits])

    dense.measure(frozenset({GRAM}), look)
    buckets = max(BUCKETS, FINE * len(dense.specs))
    zeros = divided(np.array([spec.count for spec in dense.specs]), np.array(levels), buckets)
    found = knapsack(np.array(list(errors.values())), zeros, math.ceil(budget.sparsity * buckets))
    if found is None:
        raise UserError(f"sparsity {budget.sparsity} is out of reach: no matrix may lose more than {MOST:.0%}")
    chosen = {spec.name: levels[place] for spec, place in zip(dense.specs, found, strict=True)}
    return fit(dense.specs, budget, lambda shift: {name: one + shift for name, one in chosen.items()})


def divided(counts_M: np.ndarray, levels_L: np.ndarray, buckets: int) -> np.ndarray:
    """The zeros of M matrices at L levels, in units of which all weights have `buckets`; those of a level add up to it.

    What rounding takes from one matrix it gives to the next: matrices smaller than a unit count too.
    """
    before_ML = np.outer(np.concatenate([[0], counts_M.cumsum()]) / counts_M.sum(), levels_L)
    return np.diff(np.floor(before_ML * buckets).astype(np.int64), axis=0)


def knapsack(costs_ML: np.ndarray, gains_ML: np.ndarray, target: int) -> list[int] | None:
    """The choice of one of L for each of M with the least sum of costs whose gains (integers) add up to the target.

    At most 127 levels. Costs M * L * target additions, and M * target bytes. None if no choice has gained enough.
    """
    best = np.full(target + 1, np.inf)
    best[0] = 0.0
    taken = np.zeros((len(costs_ML), target + 1), dtype=np.int8)
    for row, (costs, gains) in enumerate(zip(costs_ML, gains_ML, strict=True)):
        # what is left to gain before this choice, for every amount that is to be gained with it
        left = np.maximum(np.arange(target + 1) - gains[:, None], 0)
        ways = best[left] + costs[:, None]
        taken[row] = ways.argmin(0)
        best = ways.min(0)
    if not np.isfinite(best[target]):
        return None
    chosen: list[int] = []
    for row in reversed(range(len(costs_ML))):
        chosen.append(int(taken[row, target]))
        target = max(target - int(gains_ML[row, chosen[-1]]), 0)
    return chosen[::-1]


def _levels() -> list[float]:
    densities = [KEPT**power for power in range(100) if KEPT**power > 1 - MOST]
    return [1 - density for density in densities] + [MOST]
