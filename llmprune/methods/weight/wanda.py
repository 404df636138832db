"""Wanda: weights times activation norms, compared within an output row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmprune import masks, scores
from llmprune.statistics import MOMENTS, Stats
from llmprune.types import Budget, Edit, Matrix


@dataclass(frozen=True)
class Wanda:
    """Remove the lowest |w_ij| * ||x_j|| of every output row; kept weights stay as they are.

    Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models", eq. 1.
    """

    kind: ClassVar[str] = "weight"
    needs: ClassVar[frozenset[str]] = frozenset({MOMENTS})
    patterns: ClassVar[tuple[str, ...]] = ("unstructured", "N:M")
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2306.11695"

    def planned(self, outputs: int, inputs: int, budget: Budget) -> int:
        return outputs * budget.pruned_of(inputs)

    def solve(self, matrix: Matrix, stats: Stats | None, budget: Budget) -> Edit:
        assert stats is not None
        pruned_OI = masks.select(scores.wanda(matrix, stats), budget, by="row")
        return Edit(matrix.weight_OI.masked_fill(pruned_OI, 0), pruned_OI)
