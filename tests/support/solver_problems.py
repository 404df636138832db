"""Matrices, inputs and budgets on which solvers are tried."""

from __future__ import annotations

import numpy as np
import oracles
import torch

from llmprune.statistics import GRAM, MOMENTS, Stats
from llmprune.types import Budget, Pattern

TWO_OF_4, FOUR_OF_8 = (Budget.of(None, Pattern(*pair)) for pair in ((2, 4), (4, 8)))
BUDGETS = [Budget(0.3), Budget(0.5), Budget(0.7), TWO_OF_4, FOUR_OF_8]


def label(value: object) -> str | None:
    if isinstance(value, Budget):
        return str(value.pattern) if value.pattern.structured else f"{value.sparsity:g}"
    return None


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(width: int, seed: int = 50) -> torch.Tensor:
    x_TI = normal(3 * width, width, seed=seed) @ (torch.eye(width) + 0.2 * normal(width, width, seed=seed + 1))
    return (x_TI + 0.3) * normal(width, seed=seed + 2).exp()


def stats_of(x_TI: torch.Tensor) -> Stats:
    stats = Stats(x_TI.shape[1], frozenset({GRAM, MOMENTS}))
    stats.update(x_TI)
    return stats


def damped64(stats: Stats, damping: float = 0.01) -> np.ndarray:
    return oracles.damped(stats.gram_II.double().numpy(), damping)


def apart(found_OI: torch.Tensor, expected_OI: np.ndarray) -> float:
    return float(np.linalg.norm(found_OI.double().numpy() - expected_OI) / np.linalg.norm(expected_OI))
