"""A method of our own, for tests of what the engine gives to methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llmprune.methods.weight.magnitude import Magnitude
from llmprune.statistics import DRIFT, MOMENTS, Stats
from llmprune.types import Budget, Edit, Matrix


@dataclass(frozen=True)
class Drifted:
    """Magnitude pruning that remembers how far inputs are from those of the dense model."""

    kind: ClassVar[str] = "weight"
    needs: ClassVar[frozenset[str]] = frozenset({MOMENTS, DRIFT})
    patterns: ClassVar[tuple[str, ...]] = ("unstructured",)
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = ""
    seen: ClassVar[dict[str, torch.Tensor]] = {}

    def planned(self, outputs: int, inputs: int, budget: Budget) -> int:
        return Magnitude().planned(outputs, inputs, budget)

    def solve(self, matrix: Matrix, stats: Stats | None, budget: Budget) -> Edit:
        assert stats is not None
        if stats.paired:  # a forecast measures without the dense model
            self.seen[matrix.name] = stats.drift_II.clone()
        return Magnitude().solve(matrix, stats, budget)
