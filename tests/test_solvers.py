"""Scores and solvers of the weight family against float64 references and closed forms."""

from __future__ import annotations

import itertools

import numpy as np
import oracles
import pytest
import torch
from budgets import FOUR_OF_8, TWO_OF_4, label
from draws import normal
from solver_problems import BUDGETS, apart, damped64, inputs_of, stats_of

from llmprune import masks
from llmprune.linalg import scaled
from llmprune.methods import method_of
from llmprune.methods.weight.alps import Alps
from llmprune.methods.weight.obc import Obc
from llmprune.methods.weight.scored import Scored
from llmprune.methods.weight.sparsegpt import SparseGPT
from llmprune.methods.weight.thanos import Thanos
from llmprune.recipe import Recipe
from llmprune.solvers.dsnot import dsnot
from llmprune.solvers.least_squares import redense
from llmprune.solvers.obs import eliminate
from llmprune.solvers.subsets import exact, solve_subsets
from llmprune.solvers.swaps import swaps
from llmprune.statistics import GRAM, MOMENTS, Stats
from llmprune.types import UNSTRUCTURED, Budget, Edit, Matrix, Pattern, RunError, UserError

# --- systems of subsets, exact least squares ---


def test_subsets_against_numpy() -> None:
    matrix_II = damped64(stats_of(inputs_of(14)))
    chosen_OI, right_OI = normal(9, 14) > 0, normal(9, 14, seed=1).double()
    chosen_OI[3], chosen_OI[4] = False, True
    found_OI = solve_subsets(torch.from_numpy(matrix_II), chosen_OI, right_OI).numpy()
    for row, chosen_I in enumerate(chosen_OI.numpy()):
        expected_I = np.zeros(14)
        expected_I[chosen_I] = np.linalg.solve(matrix_II[np.ix_(chosen_I, chosen_I)], right_OI[row].numpy()[chosen_I])
        np.testing.assert_allclose(found_OI[row], expected_I, atol=1e-12)
    with pytest.raises(RunError, match="not positive definite"):
        solve_subsets(-torch.from_numpy(matrix_II), chosen_OI, right_OI)


# --- OBC ---


@pytest.mark.parametrize("pattern", [UNSTRUCTURED, Pattern(2, 4), Pattern(1, 4)], ids=str)
def test_one_at_a_time_is_the_closed_form(pattern: Pattern) -> None:
    h_II = damped64(stats_of(inputs_of(12)))
    h_II /= np.sqrt(np.outer(np.diag(h_II), np.diag(h_II)))
    weight_OI = normal(4, 12).double()
    trace = eliminate(weight_OI, torch.from_numpy(np.linalg.inv(h_II)), pattern)
    for row in range(4):
        order = trace.order_OS[row].tolist()
        assert order == oracles.exact_obs(weight_OI[row].numpy(), h_II, len(order), pattern.group, pattern.keep)
        for step in range(1, len(order) + 1):
            gone_I = np.isin(np.arange(12), order[:step])
            expected = oracles.obs(weight_OI[row].numpy(), h_II, gone_I)[1]
            assert float(trace.loss_OS[row, :step].sum()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("sparsity", [0.3, 0.6])
def test_obc_takes_the_lowest_losses_of_all_rows(sparsity: float) -> None:
    stats, weight_OI = stats_of(inputs_of(16)), normal(7, 16) * normal(7, 1, seed=1).exp()
    system = scaled(stats.gram_lower_II, 0.01)
    edit = Obc().solve(Matrix("m", weight_OI), stats, Budget(sparsity))
    h_II = system.matrix_II.double().numpy()
    goal_OI = (weight_OI * system.scale_I).double()
    trace = eliminate(goal_OI, torch.from_numpy(np.linalg.inv(h_II)), UNSTRUCTURED)
    ranked = sorted(
        (float(one), row, step) for row, losses in enumerate(trace.loss_OS) for step, one in enumerate(losses)
    )
    counts = np.bincount([row for _, row, _ in ranked[: Budget(sparsity).pruned_of(112)]], minlength=7)
    for row, count in enumerate(counts.tolist()):
        assert set(edit.pruned_OI[row].nonzero().flatten().tolist()) == set(trace.order_OS[row, :count].tolist())
    best_OI = oracles.masked_least_squares(goal_OI.numpy(), h_II, edit.pruned_OI.numpy())
    assert apart(edit.weight_OI * system.scale_I, best_OI) < 1e-6


def test_obc_in_batches_of_rows_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    stats, weight_OI = stats_of(inputs_of(16)), normal(7, 16)
    whole = Obc().solve(Matrix("m", weight_OI), stats, Budget(0.5))
    monkeypatch.setattr("llmprune.solvers.obs.ELEMENTS", 2 * 16 * 16)
    parts = Obc().solve(Matrix("m", weight_OI), stats, Budget(0.5))
    assert torch.equal(whole.pruned_OI, parts.pruned_OI) and torch.equal(whole.weight_OI, parts.weight_OI)


# --- Thanos ---


def thanos(weight_OI: np.ndarray, gram_II: np.ndarray, budget: Budget, block: int) -> oracles.Reference:
    """Block by block in float64, with a fresh inverse of what is left and the removals of each row solved jointly."""
    h_II = oracles.damped(gram_II, 0.01)
    w_OI, pruned_OI = weight_OI.astype(np.float64), np.zeros(weight_OI.shape, dtype=bool)
    loss = 0.0
    for start in range(0, w_OI.shape[1], block):
        end = min(start + block, w_OI.shape[1])
        score_OB = np.abs(w_OI[:, start:end]) * np.sqrt(np.diag(gram_II)[start:end])
        if budget.pattern.structured:
            chosen_OB = oracles.lowest_of_groups(score_OB, budget.pattern.keep, budget.pattern.group)
        else:
            count = budget.pruned_of(score_OB.size)
            chosen_OB = oracles.lowest_of_rows(score_OB.reshape(1, -1), count).reshape(score_OB.shape)
        pruned_OI[:, start:end] = chosen_OB
        rest_II = h_II[start:, start:]
        for row, chosen_B in enumerate(chosen_OB):
            gone_I = np.pad(chosen_B, (0, len(rest_II) - len(chosen_B)))
            w_OI[row, start:], extra = oracles.obs(w_OI[row, start:], rest_II, gone_I)
            w_OI[row, start:][gone_I] = 0
            loss += extra
    return oracles.Reference(w_OI, pruned_OI, loss, np.inf)


@pytest.mark.parametrize("budget", BUDGETS, ids=label)
def test_thanos_against_a_fresh_inverse_for_every_block(budget: Budget) -> None:
    stats, weight_OI = stats_of(inputs_of(56)), normal(9, 56)
    edit = Thanos(block=16).solve(Matrix("m", weight_OI), stats, budget)
    reference = thanos(weight_OI.numpy(), stats.gram_II.double().numpy(), budget, 16)
    np.testing.assert_array_equal(edit.pruned_OI.numpy(), reference.pruned_OI)
    assert apart(edit.weight_OI, reference.weight_OI) < 1e-4
    h_II = damped64(stats)
    assert reference.loss == pytest.approx(oracles.quadratic(weight_OI, reference.weight_OI, h_II), rel=1e-9)
    expected = oracles.quadratic(weight_OI, reference.weight_OI, stats.gram_II.double().numpy())
    assert edit.loss == pytest.approx(expected, abs=1e-4 * reference.loss)


def test_thanos_in_one_block_is_wanda_by_matrix_with_the_best_weights() -> None:
    stats, weight_OI = stats_of(inputs_of(40)), normal(9, 40)
    edit = Thanos().solve(Matrix("m", weight_OI), stats, Budget(0.5))
    wanda = Scored("wanda", "matrix").solve(Matrix("m", weight_OI), stats, Budget(0.5))
    assert torch.equal(edit.pruned_OI, wanda.pruned_OI)
    best_OI = oracles.masked_least_squares(weight_OI.numpy(), damped64(stats), edit.pruned_OI.numpy())
    assert apart(edit.weight_OI, best_OI) < 1e-4


# --- ALPS ---


@pytest.mark.parametrize("budget", BUDGETS, ids=label)
def test_alps_settles_below_the_error_of_sparsegpt(budget: Budget) -> None:
    stats, weight_OI = stats_of(inputs_of(64)), normal(24, 64)

    def error(edit: Edit) -> float:
        return oracles.quadratic(weight_OI, edit.weight_OI, damped64(stats))

    edit = Alps().solve(Matrix("m", weight_OI), stats, budget)
    assert edit.notes["iterations"] < 300
    assert error(edit) < error(SparseGPT().solve(Matrix("m", weight_OI), stats, budget))
    polished_OI = oracles.masked_least_squares(weight_OI.numpy(), damped64(stats), edit.pruned_OI.numpy())
    best = oracles.quadratic(weight_OI, polished_OI, damped64(stats))
    assert best <= error(edit) <= 1.1 * best


# --- DSnoT ---


@pytest.mark.parametrize("budget", [Budget(0.5), Budget(0.7), TWO_OF_4, FOUR_OF_8], ids=label)
def test_dsnot_brings_the_residual_down_and_keeps_the_counts(budget: Budget) -> None:
    stats, weight_OI = stats_of(inputs_of(64)), normal(24, 64)
    start_OI = Scored("wanda").solve(Matrix("m", weight_OI), stats, budget).pruned_OI
    lost_OI = weight_OI.double() * stats.mean_I.double()
    group = budget.pattern.group or 64
    last_O = (lost_OI * start_OI).sum(1).abs()
    first_O = last_O
    for cycles in (0, 1, 2, 5, 50):
        pruned_OI = dsnot(weight_OI, start_OI, stats, budget.pattern, cycles=cycles, threshold=1e-6)
        counts = (one.unflatten(1, (-1, group)).sum(2) for one in (pruned_OI, start_OI))
        assert torch.equal(*counts)
        now_O = (lost_OI * pruned_OI).sum(1).abs()
        assert bool((now_O <= last_O + 1e-6).all())
        last_O = now_O
    assert float(last_O.sum()) < 0.5 * float(first_O.sum())


def test_dsnot_exchanges_what_the_paper_says() -> None:
    """One row by hand: mean 1 everywhere, so the residual is the sum of the pruned weights."""
    x_TI = torch.tensor([[0.0] * 5, [2.0] * 5])
    weight_OI = torch.tensor([[3.0, 2.0, 0.5, -1.0, -2.5]])
    pruned_OI = torch.tensor([[True, True, True, False, False]])
    # residual 5.5: regrow the largest (3), prune the cheapest that pulls back (-1)
    found_OI = dsnot(weight_OI, pruned_OI, stats_of(x_TI), UNSTRUCTURED, cycles=1, threshold=0.0)
    assert found_OI.tolist() == [[False, True, True, True, False]]
    # residual 1.5: regrow 2 for -2.5 would leave -3, which is no better: it stops
    again_OI = dsnot(weight_OI, pruned_OI, stats_of(x_TI), UNSTRUCTURED, cycles=50, threshold=0.0)
    assert torch.equal(found_OI, again_OI)
    # and a threshold above the residual leaves it alone
    kept_OI = dsnot(weight_OI, pruned_OI, stats_of(x_TI), UNSTRUCTURED, cycles=50, threshold=6.0)
    assert torch.equal(kept_OI, pruned_OI)


# --- options ---


@pytest.mark.parametrize(
    ("name", "options"),
    list(
        itertools.chain(
            itertools.product(["sparsegpt", "thanos", "alps", "obc"], [{"damping": 0.0}]),
            [("sparsegpt", {"order": "rosy"}), ("sparsegpt", {"bits": 1}), ("sparsegpt", {"bits": 16})],
            [("alps", {"rho": 0.0}), ("alps", {"iterations": 0}), ("dsnot", {"cycles": -1}), ("thanos", {"block": 0})],
            [("dsnot", {"score": "none"})],
        )
    ),
    ids=str,
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        method_of(Recipe(method=name, options=options))


def test_exact_is_least_squares_in_float64() -> None:
    stats, weight_OI = stats_of(inputs_of(30)), normal(8, 30)
    pruned_OI = normal(8, 30, seed=2) > 0
    system = scaled(stats.gram_lower_II, 0.01)
    goal_OI = (weight_OI * system.scale_I).double().numpy()
    best_OI = oracles.masked_least_squares(goal_OI, system.matrix_II.double().numpy(), pruned_OI.numpy())
    assert apart(exact(weight_OI, pruned_OI, system) * system.scale_I, best_OI) < 1e-6


# --- SDS ---


@pytest.mark.parametrize("penalty", [0.0, 0.3, 3.0])
def test_redense_solves_every_rows_own_ridge(penalty: float) -> None:
    stats, weight_OI, pruned_OI = stats_of(inputs_of(24)), normal(5, 24, seed=1), normal(5, 24, seed=2) > 0
    found_OI = redense(weight_OI, pruned_OI, scaled(stats.gram_lower_II, 0.01), penalty)
    gram_II = stats.gram_II.double().numpy()
    scale = np.diag(gram_II)
    h_II = gram_II + 0.01 * np.diag(scale)
    for row in range(5):
        held_II = penalty * np.diag(scale * pruned_OI[row].numpy())
        best_I = np.linalg.solve(h_II + held_II, h_II @ weight_OI[row].double().numpy())
        # on the scale of the inputs the gradient has shrunk to 1e-4 and the least eigenvalue is above 0.01
        assert (
            np.abs((found_OI[row].numpy() - best_I) * np.sqrt(scale)).max()
            <= 1e-2 * np.abs(best_I * np.sqrt(scale)).max()
        )


def test_a_large_penalty_leaves_least_squares_on_the_mask() -> None:
    stats, weight_OI, pruned_OI = stats_of(inputs_of(24)), normal(5, 24, seed=1), normal(5, 24, seed=2) > 0
    system = scaled(stats.gram_lower_II, 0.01)
    found_OI = redense(weight_OI, pruned_OI, system, 1e6)
    assert apart(found_OI, exact(weight_OI, pruned_OI, system).double().numpy()) <= 1e-2


@pytest.mark.parametrize("budget", [Budget(0.6), TWO_OF_4], ids=label)
def test_sds_is_sparsegpt_on_the_redensed_weights(budget: Budget) -> None:
    stats, weight_OI = stats_of(inputs_of(40)), normal(16, 40, seed=3)
    pattern = {"keep": budget.pattern.keep, "group": budget.pattern.group, "sparsity": budget.sparsity}
    gram_II = stats.gram_II.double().numpy()
    first = oracles.sparsegpt(weight_OI.numpy(), gram_II, **pattern)
    dense_OI = redense(weight_OI, torch.from_numpy(first.pruned_OI), scaled(stats.gram_lower_II, 0.01), 3.0)
    second = oracles.sparsegpt(dense_OI.numpy(), gram_II, **pattern)
    found = method_of(Recipe(method="sds")).solve(Matrix("m", weight_OI), stats, budget)
    assert np.array_equal(found.pruned_OI.numpy(), second.pruned_OI)
    assert apart(found.weight_OI, second.weight_OI) <= 1e-4


def test_swaps_go_on_beside_a_row_that_has_nothing_to_swap() -> None:
    """One row without a kept weight, one without a pruned one: every other row still ends in no more error."""
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(256, 48, generator=generator) @ torch.randn(48, 48, generator=generator)
    system, weight_OI = scaled((x_TI.T @ x_TI).tril(), 0.01), torch.randn(12, 48, generator=generator)
    pruned_OI = masks.select(weight_OI.abs(), Budget(0.5), by="row")
    pruned_OI[0], pruned_OI[1] = True, False
    better_OI = swaps(weight_OI, pruned_OI, system, Budget(0.5))

    def error_O(mask_OI: torch.Tensor) -> torch.Tensor:
        lost_OI = (weight_OI * system.scale_I * mask_OI).double()
        return torch.einsum("oi,ij,oj->o", lost_OI, system.matrix_II.double(), lost_OI)

    assert torch.equal(better_OI.sum(1), pruned_OI.sum(1)) and torch.equal(better_OI[:2], pruned_OI[:2])
    assert bool((error_O(better_OI)[2:] < error_O(pruned_OI)[2:]).all())


@pytest.mark.parametrize("method", ["admm", "alps", "sparsegpt", "thanos"])
def test_the_unit_of_the_activations_decides_nothing(method: str) -> None:
    """The same mask for inputs a power of two smaller, which rounds alike, where some inputs were never active."""
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(256, 64, generator=generator)
    x_TI[:, ::8] = 0
    weight_OI = torch.randn(24, 64, generator=generator)

    def solved(factor: float) -> torch.Tensor:
        stats = Stats(64, frozenset({GRAM, MOMENTS}))
        stats.update(factor * x_TI)
        edit: Edit = method_of(Recipe(method=method)).solve(Matrix("m", weight_OI), stats, Budget(0.5))
        return edit.pruned_OI

    assert torch.equal(solved(1.0), solved(2.0**-10))
