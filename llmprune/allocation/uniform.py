"""Every matrix gets the same amount."""

from __future__ import annotations

from llmprune.allocation import Weights
from llmprune.types import Budget, MatrixSpec


def uniform(specs: list[MatrixSpec], budget: Budget, weights: Weights) -> dict[str, Budget]:
    return {spec.name: budget for spec in specs}
