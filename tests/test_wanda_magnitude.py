"""Wanda and magnitude pruning: identities, exact counts, patterns, and kept weights untouched."""

from __future__ import annotations

import math

import budgets
import numpy as np
import oracles
import pytest
import torch
from budgets import TWO_OF_4
from draws import normal

from llmprune.methods.weight.magnitude import Magnitude
from llmprune.methods.weight.wanda import Wanda
from llmprune.statistics import GRAM, Stats
from llmprune.types import Budget, Edit, Matrix, Pattern

METHODS = [Magnitude(), Wanda()]
SHAPES = [(1, 1), (3, 5), (17, 63), (64, 300), (5, 500)]
SPARSITIES = [0.0, 0.1, 0.3, 0.5, 0.65, 0.7, 0.999]
PAIRS = [(1, 4), (2, 4), (4, 8), (3, 5)]


def label(value: object) -> str | None:
    return type(value).__name__ if isinstance(value, Magnitude | Wanda) else budgets.label(value)


def inputs_of(width: int, tokens: int = 64, seed: int = 5) -> torch.Tensor:
    """Inputs whose columns differ in size by up to 50 times."""
    return normal(tokens, width, seed=seed) * (normal(width, seed=seed + 1)).exp()


def gathered(x_TI: torch.Tensor, kinds: frozenset[str] = Wanda.needs) -> Stats:
    stats = Stats(x_TI.shape[1], kinds)
    stats.update(x_TI)
    return stats


def solve(method: Magnitude | Wanda, weight_OI: torch.Tensor, budget: Budget, x_TI: torch.Tensor | None = None) -> Edit:
    """Solve and check what every answer must satisfy: the planned count, and kept weights untouched."""
    stats = None
    if method.needs:
        stats = gathered(inputs_of(weight_OI.shape[1]) if x_TI is None else x_TI, method.needs)
    before_OI = weight_OI.clone()
    edit = method.solve(Matrix("m", weight_OI), stats, budget)
    assert torch.equal(weight_OI, before_OI)
    assert edit.pruned_OI.dtype == torch.bool and edit.weight_OI.dtype == torch.float32
    assert int(edit.pruned_OI.sum()) == method.planned(*weight_OI.shape, budget)
    assert torch.equal(edit.weight_OI, torch.where(edit.pruned_OI, 0.0, weight_OI))
    return edit


# --- both ---


@pytest.mark.parametrize("method", METHODS, ids=label)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_at_zero_the_dense_matrix_comes_back(method: Magnitude | Wanda, shape: tuple[int, int]) -> None:
    weight_OI = normal(*shape)
    weight_OI[::2] = -0.0
    for budget in (Budget(0.0), Budget.of(None, Pattern(1, 1))):
        edit = solve(method, weight_OI, budget)
        assert torch.equal(edit.weight_OI.view(torch.int32), weight_OI.view(torch.int32))
        assert not bool(edit.pruned_OI.any())


@pytest.mark.parametrize("method", METHODS, ids=label)
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_patterns_are_exact(method: Magnitude | Wanda, pair: tuple[int, int]) -> None:
    keep, group = pair
    edit = solve(method, normal(9, 15 * group), Budget.of(None, Pattern(keep, group)))
    assert bool(((~edit.pruned_OI).unflatten(1, (-1, group)).sum(2) == keep).all())


@pytest.mark.parametrize("method", METHODS, ids=label)
@pytest.mark.parametrize("budget", [Budget(0.5), TWO_OF_4], ids=label)
def test_the_same_call_gives_the_same_bits(method: Magnitude | Wanda, budget: Budget) -> None:
    weight_OI = (normal(24, 200) * 8).round() / 8  # many ties
    first, second = solve(method, weight_OI, budget), solve(method, weight_OI.T.contiguous().T, budget)
    assert torch.equal(first.pruned_OI, second.pruned_OI) and torch.equal(first.weight_OI, second.weight_OI)


@pytest.mark.parametrize("method", METHODS, ids=label)
@pytest.mark.parametrize("budget", [Budget(0.3), Budget(0.7), Budget.of(None, Pattern(4, 8))], ids=label)
def test_pruning_again_changes_nothing(method: Magnitude | Wanda, budget: Budget) -> None:
    once = solve(method, normal(24, 200), budget)
    twice = solve(method, once.weight_OI, budget)
    assert torch.equal(once.pruned_OI, twice.pruned_OI) and torch.equal(once.weight_OI, twice.weight_OI)


# --- magnitude ---


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_magnitude_takes_the_smallest_of_the_matrix(shape: tuple[int, int], sparsity: float) -> None:
    weight_OI = (normal(*shape) * 16).round() / 16
    edit = solve(Magnitude(), weight_OI, Budget(sparsity))
    count = math.floor(sparsity * weight_OI.numel() + 0.5)
    assert int(edit.pruned_OI.sum()) == count
    expected_1N = oracles.lowest_of_rows(weight_OI.abs().reshape(1, -1).numpy(), count)
    np.testing.assert_array_equal(edit.pruned_OI.reshape(1, -1).numpy(), expected_1N)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_magnitude_takes_the_smallest_of_each_group(pair: tuple[int, int]) -> None:
    weight_OI = (normal(9, 40) * 4).round()
    edit = solve(Magnitude(), weight_OI, Budget.of(None, Pattern(*pair)))
    np.testing.assert_array_equal(edit.pruned_OI.numpy(), oracles.lowest_of_groups(weight_OI.abs().numpy(), *pair))


def test_magnitude_reads_no_statistics() -> None:
    assert Magnitude.needs == frozenset()
    weight_OI = normal(8, 12)
    # not even of inputs that would overrule it
    loud = gathered(torch.full((4, 12), 1e6))
    with_stats = Magnitude().solve(Matrix("m", weight_OI), loud, Budget(0.5))
    assert torch.equal(with_stats.pruned_OI, solve(Magnitude(), weight_OI, Budget(0.5)).pruned_OI)


# --- Wanda ---


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_wanda_removes_the_same_count_from_every_row(shape: tuple[int, int], sparsity: float) -> None:
    edit = solve(Wanda(), normal(*shape), Budget(sparsity))
    assert edit.pruned_OI.sum(1).tolist() == [math.floor(sparsity * shape[1] + 0.5)] * shape[0]


@pytest.mark.parametrize("budget", [Budget(0.3), Budget(0.5), Budget(0.7), TWO_OF_4], ids=label)
@pytest.mark.parametrize("shape", [(17, 64), (8, 300)], ids=str)
def test_wanda_scores_against_float64(shape: tuple[int, int], budget: Budget) -> None:
    weight_OI, x_TI = normal(*shape), inputs_of(shape[1])
    scores_OI = np.abs(weight_OI.double().numpy()) * np.linalg.norm(x_TI.double().numpy(), axis=0)
    if budget.pattern.structured:
        expected_OI, selected_GN = oracles.lowest_of_groups(scores_OI, 2, 4), scores_OI.reshape(-1, 4)
    else:
        expected_OI, selected_GN = oracles.lowest_of_rows(scores_OI, budget.pruned_of(shape[1])), scores_OI
    # Norms of 64 tokens in float32 err by at most 34 ulps (half of the 68 of the squares), the product by 2:
    # the last that is pruned and the first that is kept must be further apart than two such errors.
    count = budget.pruned_of(selected_GN.shape[1])
    ranked_GN = np.sort(selected_GN, axis=1)
    assert np.min(ranked_GN[:, count] / ranked_GN[:, count - 1] - 1) > 2 * 36 * 2.0**-24
    np.testing.assert_array_equal(solve(Wanda(), weight_OI, budget, x_TI).pruned_OI.numpy(), expected_OI)


@pytest.mark.parametrize("budget", [Budget(0.5), Budget(0.7), TWO_OF_4], ids=label)
def test_wanda_with_equal_norms_is_magnitude_by_row(budget: Budget) -> None:
    # 64 signs a column: every norm is exactly 8, and multiplying by it rounds nothing
    x_TI = normal(64, 100, seed=1).sign()
    weight_OI = (normal(12, 100) * 16).round() / 16  # many ties
    edit = solve(Wanda(), weight_OI, budget, x_TI)
    if budget.pattern.structured:
        assert torch.equal(edit.pruned_OI, solve(Magnitude(), weight_OI, budget).pruned_OI)
    else:
        by_row_OI = torch.cat([solve(Magnitude(), row_OI, budget).pruned_OI for row_OI in weight_OI.split(1)])
        assert torch.equal(edit.pruned_OI, by_row_OI)


@pytest.mark.parametrize("budget", [Budget(0.5), Budget(0.7), TWO_OF_4], ids=label)
def test_wanda_ignores_the_units_of_an_input(budget: Budget) -> None:
    # powers of two, so that scaling commutes with rounding and even ties stay ties
    scale_I = torch.exp2(torch.randint(-6, 7, (100,), generator=torch.Generator().manual_seed(2)).float())
    weight_OI, x_TI = normal(12, 100), inputs_of(100)
    edit = solve(Wanda(), weight_OI, budget, x_TI)
    scaled = solve(Wanda(), weight_OI / scale_I, budget, x_TI * scale_I)
    assert torch.equal(edit.pruned_OI, scaled.pruned_OI)
    # the scales do matter to magnitude, so the test would notice if the norms were not used
    assert not torch.equal(
        solve(Magnitude(), weight_OI, budget).pruned_OI,
        solve(Magnitude(), weight_OI / scale_I, budget).pruned_OI,
    )


@pytest.mark.parametrize("budget", [Budget(0.5), Budget(0.7), TWO_OF_4], ids=label)
def test_wanda_treats_every_row_by_itself(budget: Budget) -> None:
    weight_OI, x_TI = normal(12, 100), inputs_of(100)
    together = solve(Wanda(), weight_OI, budget, x_TI)
    louder = solve(Wanda(), weight_OI * torch.exp2(torch.arange(12.0))[:, None], budget, x_TI)
    assert torch.equal(together.pruned_OI, louder.pruned_OI)
    for i in range(12):
        alone = solve(Wanda(), weight_OI[i : i + 1], budget, x_TI)
        assert torch.equal(together.pruned_OI[i : i + 1], alone.pruned_OI)


def test_wanda_score_is_the_loss_of_one_weight() -> None:
    """(|w| ‖x_j‖)² = w² G_jj = ‖X ΔWᵀ‖² if only that weight goes: each one is tried."""
    weight_OI, x_TI = normal(6, 20), inputs_of(20)
    edit = solve(Wanda(), weight_OI, Budget(1 / 20), x_TI)
    weight, x = weight_OI.double().numpy(), x_TI.double().numpy()
    for i in range(6):
        losses = []
        for j in range(20):
            pruned_I = weight[i].copy()
            pruned_I[j] = 0
            losses.append(np.sum((x @ (weight[i] - pruned_I)) ** 2))
        assert edit.pruned_OI[i].nonzero().flatten().tolist() == [int(np.argmin(losses))]


@pytest.mark.parametrize("seed", range(3))
def test_wanda_is_optimal_for_orthogonal_inputs(seed: int) -> None:
    weight_OI, sizes_I = normal(1, 8, seed=seed), normal(8, seed=50 + seed).exp()
    edit = solve(Wanda(), weight_OI, Budget(0.5), torch.diag(sizes_I))
    h_II = np.diag(sizes_I.double().numpy() ** 2)
    reached = oracles.quadratic(weight_OI.numpy(), edit.weight_OI.numpy(), h_II)
    assert reached == pytest.approx(oracles.best_loss(weight_OI[0].double().numpy(), h_II, 4), rel=1e-12)


def test_wanda_prunes_inputs_that_were_never_active_first() -> None:
    x_TI = inputs_of(40)
    dead_I = torch.arange(40) % 4 == 1
    x_TI[:, dead_I] = 0
    weight_OI = normal(7, 40)
    assert torch.equal(solve(Wanda(), weight_OI, Budget(0.25), x_TI).pruned_OI, dead_I.expand(7, 40))
    # fewer than that: all their scores are zero, so the first of them go
    fewer = solve(Wanda(), weight_OI, Budget(0.1), x_TI)
    assert torch.equal(fewer.pruned_OI, (dead_I & (torch.arange(40) < 16)).expand(7, 40))


def test_wanda_takes_half_precision_inputs_beyond_their_squares() -> None:
    x_TI = torch.ones(8, 12)
    x_TI[:, 6:] = 1000  # squares overflow float16
    weight_OI = torch.ones(3, 12)
    edit = solve(Wanda(), weight_OI, Budget(0.5), x_TI.half())
    assert torch.equal(edit.pruned_OI, (torch.arange(12) < 6).expand(3, 12))


def test_wanda_reads_a_gram_matrix_where_there_is_one_already() -> None:
    weight_OI, x_TI = normal(12, 100), (inputs_of(100) * 8).round()  # small integers: sums are exact
    of_moments = solve(Wanda(), weight_OI, Budget(0.5), x_TI)
    of_gram = Wanda().solve(Matrix("m", weight_OI), gathered(x_TI, frozenset({GRAM})), Budget(0.5))
    assert torch.equal(of_moments.pruned_OI, of_gram.pruned_OI)
