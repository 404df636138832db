"""DSnoT: a scored mask, improved by exchanges that need nothing but means and variances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmprune.methods.weight.scored import Scored
from llmprune.solvers.dsnot import dsnot
from llmprune.statistics import MOMENTS, Stats
from llmprune.types import Budget, Edit, Matrix


@dataclass(frozen=True)
class Dsnot:
    """Zhang et al. 2023, "Dynamic Sparse No Training" (arXiv:2310.08915), on the mask of any score.

    `score`: where the mask comes from (within its natural group). `cycles`: exchanges a row at most. `threshold`:
    the residual at which a row is left alone, as a mean over tokens; the authors compare a sum over sequences of
    2048 tokens with 0.1. `seed`: of the score `random`.
    """

    score: str = "wanda"
    cycles: int = 50
    threshold: float = 0.1 / 2048
    seed: int = 0

    kind: ClassVar[str] = "weight"
    patterns: ClassVar[tuple[str, ...]] = ("unstructured", "N:M")
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2310.08915"

    def __post_init__(self) -> None:
        Scored(self.score)  # raises ValueError for an unknown score
        if self.cycles < 0 or self.threshold < 0:
            raise ValueError(f"cycles {self.cycles} and threshold {self.threshold} must not be negative")

    @property
    def needs(self) -> frozenset[str]:
        return self._start.needs | {MOMENTS}

    @property
    def _start(self) -> Scored:
        return Scored(self.score, seed=self.seed)

    def planned(self, outputs: int, inputs: int, budget: Budget) -> int:
        return self._start.planned(outputs, inputs, budget)

    def solve(self, matrix: Matrix, stats: Stats | None, budget: Budget) -> Edit:
        assert stats is not None
        start_OI = self._start.select(matrix, stats, budget)
        pruned_OI = dsnot(
            matrix.weight_OI, start_OI, stats, budget.pattern, cycles=self.cycles, threshold=self.threshold
        )
        return Edit(matrix.weight_OI.masked_fill(pruned_OI, 0), pruned_OI)
