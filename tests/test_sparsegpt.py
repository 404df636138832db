"""SparseGPT against a float64 textbook, closed forms and brute force.

Inputs of three kinds: `white` (independent), `correlated` (a moving average, a few strong directions
and some columns ten times as large; the damped Gram matrix has a condition number of a few thousand)
and `singular` (fewer tokens than inputs). The oracle reads the same float32 Gram matrix as the
method, so what is compared is the solver alone.
"""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from budgets import FOUR_OF_8, ONE_OF_4, TWO_OF_4, label
from sparsegpt_problems import (
    BUDGETS,
    KINDS,
    TOLERANCE,
    assert_same,
    clear_case,
    gram64,
    make_stats,
    make_weight,
    solve,
    stats_of,
    textbook,
)

from llmprune.methods.weight.sparsegpt import SparseGPT
from llmprune.types import Budget, Matrix, Pattern

SHAPES = [(64, 300), (96, 128), (40, 256), (24, 200), (1, 64), (7, 136), (3, 8), (33, 131)]
CASES = [(shape, budget) for shape in SHAPES for budget in BUDGETS if not shape[1] % max(budget.pattern.group, 1)]


# --- the oracle itself, against closed forms that share no code with it ---


@pytest.mark.parametrize("budget", BUDGETS, ids=label)
def test_oracle_loss_is_the_quadratic_form(budget: Budget) -> None:
    weight_OI, stats = make_weight(6, 40, 0), make_stats("correlated", 40)
    reference = textbook(weight_OI, stats, budget, block=16)
    h_II = oracles.damped(gram64(stats), 0.01)
    assert reference.loss == pytest.approx(oracles.quadratic(weight_OI, reference.weight_OI, h_II), rel=1e-11)


def test_three_ways_to_the_best_weights_agree() -> None:
    generator = np.random.default_rng(3)
    x_TI, weight_I = generator.standard_normal((30, 12)), generator.standard_normal(12)
    pruned_I = generator.permutation(12) < 5
    h_II = x_TI.T @ x_TI + 0.3 * np.eye(12)
    by_rows_I = oracles.masked_least_squares(weight_I[None], h_II, pruned_I[None])[0]
    by_obs_I, loss = oracles.obs(weight_I, h_II, pruned_I)
    by_inputs_I = oracles.least_squares_on_inputs(weight_I, x_TI, 0.3, pruned_I)
    np.testing.assert_allclose(by_obs_I, by_rows_I, atol=1e-12)
    np.testing.assert_allclose(by_inputs_I, by_rows_I, atol=1e-12)
    assert loss == pytest.approx(oracles.quadratic(weight_I[None], by_rows_I[None], h_II), rel=1e-11)


def test_oracle_for_two_inputs_by_hand() -> None:
    # H = [[2, 1], [1, 2]] * 3: U_00^2 = inv(H)_00 = 2/9, U_11^2 = 1/6; scores 4.5 w0^2 and 6 w1^2
    gram_II = 3 * np.array([[2.0, 1.0], [1.0, 2.0]])
    reference = oracles.sparsegpt(np.array([[1.0, 3.0]]), gram_II, sparsity=0.5, damping=0.0)
    assert reference.pruned_OI.tolist() == [[True, False]]
    np.testing.assert_allclose(reference.weight_OI, [[0, 3 + 1 * 1 / 2]], atol=1e-14)
    assert reference.loss == pytest.approx(4.5, rel=1e-14)
    # 4.5 * 1.15^2 = 5.95 < 6: a slightly larger weight still goes first, because it can be made up for
    assert oracles.sparsegpt(np.array([[1.15, 1.0]]), gram_II, sparsity=0.5, damping=0.0).pruned_OI[0, 0]
    assert oracles.sparsegpt(np.array([[1.16, 1.0]]), gram_II, sparsity=0.5, damping=0.0).pruned_OI[0, 1]


# --- the textbook's masks and weights ---


@pytest.mark.parametrize(("shape", "budget"), CASES, ids=label)
@pytest.mark.parametrize("kind", KINDS)
def test_masks_and_weights_are_the_textbooks(kind: str, shape: tuple[int, int], budget: Budget) -> None:
    weight_OI, stats, reference = clear_case(kind, shape, budget)
    edit = solve(weight_OI, stats, budget)
    assert_same(edit, reference)
    assert edit.notes.get("damping", 0.01) == 0.01


@pytest.mark.parametrize("block", [1, 8, 40, 200, 1000])
@pytest.mark.parametrize("budget", [Budget(0.5), TWO_OF_4, FOUR_OF_8], ids=label)
def test_other_block_widths(budget: Budget, block: int) -> None:
    weight_OI, stats, reference = clear_case("correlated", (24, 200), budget, block=block)
    assert_same(solve(weight_OI, stats, budget, SparseGPT(block=block)), reference)


def test_block_width_that_no_group_divides() -> None:
    # Where blocks end does not matter to N:M, so 100 with groups of 8 must be like any other width.
    weight_OI, stats, reference = clear_case("correlated", (24, 200), FOUR_OF_8)
    assert_same(solve(weight_OI, stats, FOUR_OF_8, SparseGPT(block=100)), reference)
    assert_same(solve(weight_OI, stats, FOUR_OF_8, SparseGPT(block=3)), reference)


@pytest.mark.parametrize("pair", [(3, 5), (1, 2), (7, 8), (8, 16)], ids=str)
def test_unusual_patterns(pair: tuple[int, int]) -> None:
    budget = Budget.of(None, Pattern(*pair))
    weight_OI, stats, reference = clear_case("correlated", (16, 240), budget, block=120 if pair == (3, 5) else 128)
    assert_same(solve(weight_OI, stats, budget), reference)


@pytest.mark.parametrize("damping", [0.001, 0.1, 1.0])
def test_other_dampings(damping: float) -> None:
    weight_OI, stats, reference = clear_case("white", (24, 200), Budget(0.5), damping=damping)
    assert_same(solve(weight_OI, stats, Budget(0.5), SparseGPT(damping=damping)), reference)


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**20])
def test_the_scale_of_the_inputs_does_not_matter(scale: float) -> None:
    # powers of four times G, exactly: every intermediate result is scaled by a power of two
    weight_OI, stats = make_weight(24, 200, 0), make_stats("correlated", 200)
    edit = solve(weight_OI, stats, Budget(0.5))
    scaled = solve(weight_OI, stats_of(stats.gram_II * scale), Budget(0.5))
    assert torch.equal(edit.pruned_OI, scaled.pruned_OI)
    assert float((edit.weight_OI - scaled.weight_OI).norm() / edit.weight_OI.norm()) <= TOLERANCE


# --- counts ---


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.3, 0.5, 0.65, 0.999])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 129), (5, 127), (7, 300)], ids=str)
def test_every_block_loses_its_exact_share(shape: tuple[int, int], sparsity: float) -> None:
    edit = solve(make_weight(*shape, 0), make_stats("white", shape[1]), Budget(sparsity))
    for columns_OB in edit.pruned_OI.split(128, dim=1):
        assert int(columns_OB.sum()) == int(np.floor(sparsity * columns_OB.numel() + 0.5))


@pytest.mark.parametrize("budget", [ONE_OF_4, TWO_OF_4, FOUR_OF_8], ids=label)
def test_every_group_is_valid(budget: Budget) -> None:
    edit = solve(make_weight(9, 136, 0), make_stats("correlated", 136), budget)
    kept_OG = (~edit.pruned_OI).unflatten(1, (-1, budget.pattern.group)).sum(2)
    assert bool((kept_OG == budget.pattern.keep).all())


def test_equal_scores_go_by_row_major_index() -> None:
    weight_OI = torch.ones(3, 8)
    edit = solve(weight_OI, stats_of(torch.eye(8)), Budget(0.5))
    assert edit.pruned_OI.flatten().tolist() == [True] * 12 + [False] * 12
    edit = solve(weight_OI, stats_of(torch.eye(8)), TWO_OF_4)
    assert edit.pruned_OI.tolist() == [[True, True, False, False] * 2] * 3


@pytest.mark.parametrize("options", [{}, {"order": "rose"}, {"bits": 4}], ids=str)
@pytest.mark.parametrize("budget", BUDGETS, ids=label)
def test_matrices_solved_together_are_those_solved_alone(budget: Budget, options: dict[str, object]) -> None:
    """Rows never meet in the sweep, and each matrix loses its own share."""
    cases = [clear_case("correlated", shape, budget) for shape in ((40, 256), (9, 256))]
    method, stats = SparseGPT(**options), cases[0][1]
    matrices = [Matrix(str(number), case[0]) for number, case in enumerate(cases)]
    for matrix, edit in zip(matrices, method.solve_together(matrices, stats, budget), strict=True):
        alone = method.solve(matrix, stats, budget)
        assert torch.equal(edit.pruned_OI, alone.pruned_OI)
        assert float((edit.weight_OI - alone.weight_OI).norm() / alone.weight_OI.norm()) <= TOLERANCE
        assert edit.loss == pytest.approx(alone.loss, rel=1e-5) and edit.notes == alone.notes
