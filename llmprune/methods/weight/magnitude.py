"""Magnitude pruning: the smallest weights go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmprune import masks, scores
from llmprune.statistics import Stats
from llmprune.types import Budget, Edit, Matrix


@dataclass(frozen=True)
class Magnitude:
    """Remove the smallest |w| of each matrix; with `allocation: global`, of the whole model.

    Needs no calibration text. Han et al. 2015, "Learning both Weights and Connections".
    """

    kind: ClassVar[str] = "weight"
    needs: ClassVar[frozenset[str]] = frozenset()
    patterns: ClassVar[tuple[str, ...]] = ("unstructured", "N:M")
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:1506.02626"

    def planned(self, outputs: int, inputs: int, budget: Budget) -> int:
        return budget.pruned_of(outputs * inputs)

    def solve(self, matrix: Matrix, stats: Stats | None, budget: Budget) -> Edit:
        pruned_OI = masks.select(scores.magnitude(matrix), budget, by="matrix")
        return Edit(matrix.weight_OI.masked_fill(pruned_OI, 0), pruned_OI)
