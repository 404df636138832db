"""Every pair of values of every two axes, in few combinations."""

from __future__ import annotations

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
