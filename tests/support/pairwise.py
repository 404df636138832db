"""Every pair of values of every two axes, in few combinations."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations, product
from typing import Any


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Combinations, one value of each axis, that hold every pair of values of two axes; the same ones every time.

    Each next one is the first of those that hold most pairs not held yet.
    """
    everything = list(product(*(range(len(axis)) for axis in axes)))

    def pairs(one: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
        return {(a, b, one[a], one[b]) for a, b in combinations(range(len(axes)), 2)}

    missing = set().union(*map(pairs, everything))
    chosen = []
    while missing:
        best = max(everything, key=lambda one: len(pairs(one) & missing))
        missing -= pairs(best)
        chosen.append(tuple(axis[place] for axis, place in zip(axes, best, strict=True)))
    return chosen


def covering(*axes: Sequence[Any], seed: int = 0, tries: int = 20) -> list[tuple[Any, ...]]:
    """As `pairwise`, for axes whose combinations are too many to look at: each next one is the best of some drawn.

    A pair that is still missing is in every one of them, so that it ends.
    """
    rng = random.Random(seed)
    places = list(combinations(range(len(axes)), 2))
    missing = {(a, b, i, j): None for a, b in places for i in range(len(axes[a])) for j in range(len(axes[b]))}
    chosen = []
    while missing:
        a, b, i, j = next(iter(missing))
        drawn = [[rng.randrange(len(axis)) for axis in axes] for _ in range(tries)]
        for one in drawn:
            one[a], one[b] = i, j
        best = max(drawn, key=lambda one: sum((p, q, one[p], one[q]) in missing for p, q in places))
        for p, q in places:
            missing.pop((p, q, best[p], best[q]), None)
        chosen.append(tuple(axis[place] for axis, place in zip(axes, best, strict=True)))
    return chosen
