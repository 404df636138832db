"""Pruning by any score: the lowest go, the others stay as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llmprune import masks
from llmprune.scores import SCORES, Score
from llmprune.statistics import Stats
from llmprune.types import Budget, Edit, Matrix


@dataclass(frozen=True)
class Scored:
    """Remove the weights with the lowest score of each matrix or each output row.

    `score`: a name of `scores.SCORES`. `group`: within what scores are compared, "matrix", "row", or "natural"
    for what the score's authors chose; an N:M pattern compares within its groups. `seed`: of the score `random`.
    """

    score: str = "wanda"
    group: str = "natural"
    seed: int = 0

    kind: ClassVar[str] = "weight"
    patterns: ClassVar[tuple[str, ...]] = ("unstructured", "N:M")
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"score {self.score!r} must be one of {', '.join(sorted(SCORES))}")
        if self.group not in ("natural", "matrix", "row"):
            raise ValueError(f"group {self.group!r} must be natural, matrix or row")

    @property
    def needs(self) -> frozenset[str]:
        return self.by.needs

    def planned(self, outputs: int, inputs: int, budget: Budget) -> int:
        return outputs * budget.pruned_of(inputs) if self._within == "row" else budget.pruned_of(outputs * inputs)

    def solve(self, matrix: Matrix, stats: Stats | None, budget: Budget) -> Edit:
        pruned_OI = self.select(matrix, stats, budget)
        return Edit(matrix.weight_OI.masked_fill(pruned_OI, 0), pruned_OI)

    def select(self, matrix: Matrix, stats: Stats | None, budget: Budget) -> torch.Tensor:
        """What to prune, as bool O x I."""
        score_OI = self.by.of(matrix, stats, self.seed)
        return masks.select(score_OI, budget, by=self._within)

    @property
    def by(self) -> Score:
        """The score."""
        return SCORES[self.score]

    @property
    def _within(self) -> str:
        return self.by.group if self.group == "natural" else self.group
