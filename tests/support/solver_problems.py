"""Matrices, inputs and budgets on which solvers are tried."""

from __future__ import annotations

import numpy as np
import oracles
import torch
from budgets import FOUR_OF_8, TWO_OF_4
from draws import normal

from llmprune.statistics import GRAM, MOMENTS, Stats
from llmprune.types import Budget

BUDGETS = [Budget(0.3), Budget(0.5), Budget(0.7), TWO_OF_4, FOUR_OF_8]


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
