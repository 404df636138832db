"""Matrices, inputs and budgets on which SparseGPT is tried."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import oracles
import torch
from budgets import FOUR_OF_8, ONE_OF_4, TWO_OF_4

from llmprune.methods.weight.sparsegpt import SparseGPT
from llmprune.statistics import Stats
from llmprune.types import Budget, Edit, Matrix

# Relative error allowed to weights (Frobenius). Float32 with condition 5e3 gives 1e-7 ... 1e-6.
TOLERANCE = 1e-5
# The oracle's choices must be clearer than this (see oracles.Reference.gap), or other data are drawn:
# single compensated weights err by up to 1e-5 of their root mean square in float32.
CLEAR = 5e-5
UNSTRUCTURED = [Budget(0.3), Budget(0.5), Budget(0.7)]
BUDGETS = [*UNSTRUCTURED, ONE_OF_4, TWO_OF_4, FOUR_OF_8]
KINDS = ["white", "correlated", "singular"]


def make_weight(outputs: int, inputs: int, seed: int) -> torch.Tensor:
    values = np.random.default_rng([1, seed]).standard_normal((outputs, inputs)) / np.sqrt(inputs)
    return torch.from_numpy(values.astype(np.float32))


def make_stats(kind: str, inputs: int, seed: int = 0) -> Stats:
    generator = np.random.default_rng([2, seed])
    tokens = max(inputs // 5, 2) if kind == "singular" else 2 * inputs + 10
    x_TI = generator.standard_normal((tokens, inputs))
    if kind == "correlated":
        for j in range(1, inputs):
            x_TI[:, j] = 0.9 * x_TI[:, j - 1] + np.sqrt(1 - 0.9**2) * x_TI[:, j]
        x_TI += generator.standard_normal((tokens, 8)) @ generator.standard_normal((8, inputs)) / 4
        x_TI[:, ::37] *= 10
    stats = Stats(inputs, SparseGPT.needs)
    stats.update(torch.from_numpy(x_TI.astype(np.float32)))
    return stats


def stats_of(gram_II: np.ndarray | torch.Tensor) -> Stats:
    """Statistics that hold a given Gram matrix, with NaN above the diagonal: nobody may read that."""
    lower_II = torch.as_tensor(gram_II).float().clone()
    lower_II[torch.triu(torch.ones_like(lower_II, dtype=torch.bool), 1)] = float("nan")
    stats = Stats(len(lower_II), SparseGPT.needs)
    stats._lower_II = lower_II
    stats.tokens = 1
    return stats


def gram64(stats: Stats) -> np.ndarray:
    return stats.gram_II.double().numpy()


def solve(weight_OI: torch.Tensor, stats: Stats, budget: Budget, method: SparseGPT | None = None) -> Edit:
    """Solve and check what every answer must satisfy: exact zeros, exact counts, finite float32."""
    method = method or SparseGPT()
    edit = method.solve(Matrix("m", weight_OI), stats, budget)
    assert edit.weight_OI.dtype == torch.float32 and edit.pruned_OI.dtype == torch.bool
    assert edit.weight_OI.shape == edit.pruned_OI.shape == weight_OI.shape
    assert int(edit.pruned_OI.sum()) == method.planned(*weight_OI.shape, budget)
    assert bool(torch.isfinite(edit.weight_OI).all())
    assert not bool(edit.weight_OI[edit.pruned_OI].any())
    return edit


def textbook(weight_OI: torch.Tensor, stats: Stats, budget: Budget, **options: float) -> oracles.Reference:
    return oracles.sparsegpt(
        weight_OI.numpy(),
        gram64(stats),
        sparsity=budget.sparsity,
        keep=budget.pattern.keep,
        group=budget.pattern.group,
        **options,
    )


class Case(NamedTuple):
    weight_OI: torch.Tensor
    stats: Stats
    reference: oracles.Reference


def clear_case(kind: str, shape: tuple[int, int], budget: Budget, **options: float) -> Case:
    """Data on which the textbook's choices are clear enough for float32 to have to agree."""
    stats = make_stats(kind, shape[1])
    for seed in range(30):
        weight_OI = make_weight(*shape, seed)
        reference = textbook(weight_OI, stats, budget, **options)
        if reference.gap > CLEAR:
            return Case(weight_OI, stats, reference)
    raise AssertionError(f"no clear choices for {kind} {shape} {budget}")


def assert_same(edit: Edit, reference: oracles.Reference) -> None:
    np.testing.assert_array_equal(edit.pruned_OI.numpy(), reference.pruned_OI)
    apart = np.linalg.norm(edit.weight_OI.double().numpy() - reference.weight_OI)
    assert apart <= TOLERANCE * np.linalg.norm(reference.weight_OI)
