"""SparseGPT against a float64 textbook, closed forms and brute force.

Inputs of three kinds: `white` (independent), `correlated` (a moving average, a few strong directions
and some columns ten times as large; the damped Gram matrix has a condition number of a few thousand)
and `singular` (fewer tokens than inputs). The oracle reads the same float32 Gram matrix as the
method, so what is compared is the solver alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import oracles
import pytest
import torch

from llmprune.methods.weight.sparsegpt import SparseGPT
from llmprune.statistics import Stats
from llmprune.types import Budget, Edit, Matrix, Pattern, RunError

# Relative error allowed to weights (Frobenius). Float32 with condition 5e3 gives 1e-7 ... 1e-6.
TOLERANCE = 1e-5
# The oracle's choices must be clearer than this (see oracles.Reference.gap), or other data are drawn:
# single compensated weights err by up to 1e-5 of their root mean square in float32.
CLEAR = 5e-5

UNSTRUCTURED = [Budget(0.3), Budget(0.5), Budget(0.7)]
ONE_OF_4, TWO_OF_4, FOUR_OF_8 = (Budget.of(None, Pattern(*pair)) for pair in ((1, 4), (2, 4), (4, 8)))
BUDGETS = [*UNSTRUCTURED, ONE_OF_4, TWO_OF_4, FOUR_OF_8]
SHAPES = [(64, 300), (96, 128), (40, 256), (24, 200), (1, 64), (7, 136), (3, 8), (33, 131)]
CASES = [(shape, budget) for shape in SHAPES for budget in BUDGETS if not shape[1] % max(budget.pattern.group, 1)]
KINDS = ["white", "correlated", "singular"]


def label(value: object) -> str | None:
    if isinstance(value, Budget):
        return str(value.pattern) if value.pattern.structured else f"{value.sparsity:g}"
    return "x".join(map(str, value)) if isinstance(value, tuple) else None


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


# --- identities ---


@pytest.mark.parametrize("budget", BUDGETS, ids=label)
@pytest.mark.parametrize("kind", KINDS)
def test_reported_loss_is_the_change_of_the_outputs(kind: str, budget: Budget) -> None:
    """Σe² = ‖ΔW‖²_H with the damped H, and `loss` is that without the damping's share."""
    weight_OI, stats, reference = clear_case(kind, (40, 256), budget)
    edit = solve(weight_OI, stats, budget)
    gram_II = gram64(stats)
    h_II = oracles.damped(gram_II, 0.01)
    damped_loss = oracles.quadratic(weight_OI, edit.weight_OI, h_II)
    assert damped_loss == pytest.approx(reference.loss, rel=1e-5)
    # as a float32 sum and difference: 1e-5 of the larger of the two
    loss = oracles.quadratic(weight_OI, edit.weight_OI, gram_II)
    assert edit.loss == pytest.approx(loss, abs=1e-5 * reference.loss)


@pytest.mark.parametrize("scale", [1.0, 7.3])
def test_with_orthogonal_inputs_it_is_magnitude_by_block(scale: float) -> None:
    weight_OI = make_weight(24, 300, 0)
    edit = solve(weight_OI, stats_of(scale * torch.eye(300)), Budget(0.5))
    for block_OB, pruned_OB in zip(weight_OI.split(128, 1), edit.pruned_OI.split(128, 1), strict=True):
        expected_1N = oracles.lowest_of_rows(block_OB.abs().reshape(1, -1).numpy(), block_OB.numel() // 2)
        np.testing.assert_array_equal(pruned_OB.reshape(1, -1).numpy(), expected_1N)
    assert torch.equal(edit.weight_OI, weight_OI.masked_fill(edit.pruned_OI, 0))


def test_with_orthogonal_inputs_a_pattern_is_magnitude_by_group() -> None:
    weight_OI = make_weight(24, 256, 0)
    edit = solve(weight_OI, stats_of(torch.eye(256)), FOUR_OF_8)
    np.testing.assert_array_equal(edit.pruned_OI.numpy(), oracles.lowest_of_groups(weight_OI.abs().numpy(), 4, 8))
    assert torch.equal(edit.weight_OI, weight_OI.masked_fill(edit.pruned_OI, 0))


def prefixes(inputs: int) -> tuple[torch.Tensor, torch.Tensor, Budget]:
    """Weights that are tiny in the first i * 4 columns of row i, that mask, and the budget that finds it."""
    weight_OI = make_weight(20, inputs, 0).sign() + make_weight(20, inputs, 1)
    tiny_OI = torch.arange(inputs) < 4 * torch.arange(20)[:, None]
    weight_OI[tiny_OI] *= 1e-3
    return weight_OI, tiny_OI, Budget(float(tiny_OI.sum()) / tiny_OI.numel())


def test_if_all_pruned_inputs_come_first_it_is_exact_least_squares() -> None:
    weight_OI, tiny_OI, budget = prefixes(96)
    stats = make_stats("correlated", 96)
    edit = solve(weight_OI, stats, budget)
    assert torch.equal(edit.pruned_OI, tiny_OI)
    h_II = oracles.damped(gram64(stats), 0.01)
    best_OI = oracles.masked_least_squares(weight_OI.numpy(), h_II, tiny_OI.numpy())
    moved = np.linalg.norm(best_OI - weight_OI.numpy())
    # the compensation itself, not only the weights it is added to; which is tiny: add its rounding
    rounding = 2.0**-24 * np.linalg.norm(best_OI)
    assert np.linalg.norm(edit.weight_OI.numpy() - best_OI) <= 1e-5 * moved + 2 * rounding


def test_if_all_pruned_inputs_come_last_nothing_can_make_up_for_them() -> None:
    weight_OI, tiny_OI, budget = prefixes(96)
    weight_OI, tiny_OI = weight_OI.flip(1), tiny_OI.flip(1)
    stats = make_stats("correlated", 96)
    edit = solve(weight_OI, stats, budget)
    assert torch.equal(edit.pruned_OI, tiny_OI)
    assert torch.equal(edit.weight_OI, weight_OI.masked_fill(tiny_OI, 0))
    h_II = oracles.damped(gram64(stats), 0.01)
    best_OI = oracles.masked_least_squares(weight_OI.numpy(), h_II, tiny_OI.numpy())
    assert oracles.quadratic(weight_OI, edit.weight_OI, h_II) > 1.5 * oracles.quadratic(weight_OI, best_OI, h_II)


@pytest.mark.parametrize("budget", BUDGETS, ids=label)
@pytest.mark.parametrize("kind", KINDS)
def test_between_no_update_and_exact_least_squares(kind: str, budget: Budget) -> None:
    weight_OI, stats = make_weight(24, 200, 0), make_stats(kind, 200)
    edit = solve(weight_OI, stats, budget)
    h_II = oracles.damped(gram64(stats), 0.01)
    best_OI = oracles.masked_least_squares(weight_OI.numpy(), h_II, edit.pruned_OI.numpy())
    best = oracles.quadratic(weight_OI, best_OI, h_II)
    reached = oracles.quadratic(weight_OI, edit.weight_OI, h_II)
    plain = oracles.quadratic(weight_OI, weight_OI.masked_fill(edit.pruned_OI, 0), h_II)
    # near the optimum the loss is flat: float32 weights change it by (1e-6)^2 only
    assert best * (1 - 1e-9) <= reached < plain


@pytest.mark.parametrize("seed", range(5))
def test_one_row_against_every_mask(seed: int) -> None:
    weight_OI, stats = make_weight(1, 8, seed), make_stats("correlated", 8, seed)
    h_II = oracles.damped(gram64(stats), 0.01)
    best = oracles.best_loss(weight_OI[0].double().numpy(), h_II, 4)
    for budget in (Budget(0.5), TWO_OF_4, FOUR_OF_8):
        edit = solve(weight_OI, stats, budget)
        assert oracles.quadratic(weight_OI, edit.weight_OI, h_II) >= best * (1 - 1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(64, 300), (1, 1), (5, 128)], ids=str)
def test_nothing_pruned_is_the_dense_matrix_bit_for_bit(shape: tuple[int, int], kind: str) -> None:
    weight_OI = make_weight(*shape, 0)
    for budget in (Budget(0.0), Budget.of(None, Pattern(1, 1))):
        edit = solve(weight_OI, make_stats(kind, shape[1]), budget)
        assert torch.equal(edit.weight_OI, weight_OI)
        assert not bool(edit.pruned_OI.any()) and edit.loss == 0


def test_nothing_pruned_keeps_the_sign_of_zeros() -> None:
    weight_OI = make_weight(8, 300, 0)
    weight_OI[:, ::3] = -0.0
    edit = solve(weight_OI, make_stats("correlated", 300), Budget(0.0))
    assert torch.equal(edit.weight_OI.contiguous().view(torch.int32), weight_OI.view(torch.int32))


@pytest.mark.parametrize("budget", BUDGETS, ids=label)
def test_pruning_again_changes_nothing(budget: Budget) -> None:
    stats = make_stats("correlated", 200)
    once = solve(make_weight(24, 200, 0), stats, budget)
    twice = solve(once.weight_OI, stats, budget)
    assert torch.equal(once.pruned_OI, twice.pruned_OI)
    assert torch.equal(once.weight_OI, twice.weight_OI)
    assert twice.loss == 0


def test_the_same_call_gives_the_same_bits() -> None:
    weight_OI, stats = make_weight(64, 300, 0), make_stats("correlated", 300)
    before_OI, gram_II = weight_OI.clone(), stats.gram_II
    for budget in BUDGETS[:5]:
        first, fresh = (
            solve(weight_OI, stats, budget),
            solve(weight_OI, make_stats("correlated", 300), budget),
        )
        assert torch.equal(first.weight_OI, fresh.weight_OI) and torch.equal(first.pruned_OI, fresh.pruned_OI)
    assert torch.equal(weight_OI, before_OI) and torch.equal(stats.gram_II, gram_II)


def test_new_tokens_are_not_ignored() -> None:
    weight_OI, stats = make_weight(24, 128, 0), make_stats("white", 128)
    solve(weight_OI, stats, Budget(0.5))
    more_TI = torch.from_numpy(np.random.default_rng(9).standard_normal((300, 128)).astype(np.float32))
    more_TI[:, 64:] *= 3
    stats.update(more_TI)
    fresh = stats_of(stats.gram_II)
    assert torch.equal(solve(weight_OI, stats, Budget(0.5)).weight_OI, solve(weight_OI, fresh, Budget(0.5)).weight_OI)


def test_two_dampings_do_not_share_a_factor() -> None:
    weight_OI, stats = make_weight(24, 128, 0), make_stats("correlated", 128)
    for method in (SparseGPT(damping=0.01), SparseGPT(damping=1.0)):
        alone = solve(weight_OI, make_stats("correlated", 128), Budget(0.5), method)
        assert torch.equal(solve(weight_OI, stats, Budget(0.5), method).weight_OI, alone.weight_OI)


def test_weights_in_any_memory_layout() -> None:
    weight_OI, stats = make_weight(24, 200, 0), make_stats("correlated", 200)
    strided_OI = torch.empty(200, 48)[:, ::2].T.copy_(weight_OI)
    plain, strided = solve(weight_OI, stats, Budget(0.5)), solve(strided_OI, stats, Budget(0.5))
    assert torch.equal(plain.weight_OI, strided.weight_OI)


# --- inputs that were never or seldom active ---


@pytest.mark.parametrize("budget", BUDGETS, ids=label)
def test_dead_inputs_are_weights_like_any_other(budget: Budget) -> None:
    live = make_stats("correlated", 256)
    gram_II = live.gram_II
    dead = torch.arange(256) % 5 == 0
    gram_II[dead] = 0
    gram_II[:, dead] = 0
    stats = stats_of(gram_II)
    for seed in range(30):
        weight_OI = make_weight(40, 256, seed)
        reference = textbook(weight_OI, stats, budget)
        if reference.gap > CLEAR:
            break
    assert reference.gap > CLEAR
    edit = solve(weight_OI, stats, budget)
    assert_same(edit, reference)
    # nothing correlates with a dead input, so nothing can move it: what is kept there is as it was
    kept_OI = ~edit.pruned_OI[:, dead]
    assert torch.equal(edit.weight_OI[:, dead][kept_OI], weight_OI[:, dead][kept_OI])
    assert 0 < float(edit.pruned_OI[:, dead].float().mean()) <= 1


def test_one_massive_input() -> None:
    # One column owns nearly all of trace(G), as the massive activations of language models do.
    gram_II = make_stats("white", 128).gram_II
    gram_II[5] *= 1e3
    gram_II[:, 5] *= 1e3
    edit = solve(make_weight(24, 128, 0), stats_of(gram_II), Budget(0.5))
    assert not bool(edit.pruned_OI[:, 5].any())


# --- Gram matrices that are not positive definite ---


def indefinite(off_diagonal: float, inputs: int = 64) -> Stats:
    """Ones on the diagonal and eigenvalues 1 ± `off_diagonal` of one pair: negative above 1."""
    gram_II = torch.eye(inputs)
    gram_II[40, 17] = gram_II[17, 40] = off_diagonal
    return stats_of(gram_II)


@pytest.mark.parametrize(("off_diagonal", "used"), [(1.005, 0.01), (1.05, 0.1), (1.5, 1.0)])
def test_damping_grows_tenfold_until_it_holds(off_diagonal: float, used: float) -> None:
    weight_OI = make_weight(8, 64, 0)
    edit = solve(weight_OI, indefinite(off_diagonal), Budget(0.5))
    assert edit.notes.get("damping", 0.01) == pytest.approx(used)
    asked = solve(weight_OI, indefinite(off_diagonal), Budget(0.5), SparseGPT(damping=used))
    # what the ladder found in float64 and what float32 gives at that damping differ by rounding only
    assert torch.equal(edit.pruned_OI, asked.pruned_OI)
    assert_same(edit, textbook(weight_OI, indefinite(off_diagonal), Budget(0.5), damping=used))


def test_raised_damping_is_reported_every_time_it_is_used() -> None:
    stats = indefinite(1.05)
    for seed in range(2):  # the second matrix reads the factor that the first one made
        edit = solve(make_weight(8, 64, seed), stats, TWO_OF_4)
        assert edit.notes["damping"] == pytest.approx(0.1)


def test_the_ladder_ends_at_one() -> None:
    edit = solve(make_weight(8, 64, 0), indefinite(1.9), Budget(0.5), SparseGPT(damping=0.03))
    assert edit.notes["damping"] == pytest.approx(1.0)


def test_duplicated_inputs() -> None:
    # Columns of 64 signs have norm 8, so that the second pivot of two equal ones is exactly zero.
    x_TI = np.random.default_rng(4).choice([-1.0, 1.0], (64, 32)).astype(np.float32)
    x_TI[:, 31] = x_TI[:, 30]
    stats = Stats(32, SparseGPT.needs)
    stats.update(torch.from_numpy(x_TI))
    weight_OI = make_weight(8, 32, 0)
    edit = solve(weight_OI, stats, Budget(0.5))
    assert edit.notes.get("damping", 0.01) == 0.01
    assert_same(edit, textbook(weight_OI, stats, Budget(0.5)))


@pytest.mark.parametrize("options", [{"damping": 0.0}, {"damping": -1.0}, {"damping": float("nan")}, {"block": 0}])
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        SparseGPT(**options)


@pytest.mark.parametrize(
    "gram_II",
    [
        pytest.param(-torch.eye(16), id="negative"),
        pytest.param(torch.eye(16) + 5 * torch.ones(16, 16).fill_diagonal_(0).tril(), id="indefinite"),
        pytest.param(torch.zeros(16, 16), id="no tokens"),
        pytest.param(torch.full((16, 16), float("nan")), id="nan"),
        pytest.param(torch.eye(16).index_fill(0, torch.tensor([9]), float("nan")), id="one nan row"),
        pytest.param(
            torch.eye(16).index_put((torch.tensor(9), torch.tensor(3)), torch.tensor(torch.nan)), id="one nan"
        ),
        pytest.param(
            torch.eye(16).index_put((torch.tensor(9), torch.tensor(3)), torch.tensor(torch.inf)), id="one inf"
        ),
        pytest.param(torch.diag(torch.tensor([float("inf")] + [1.0] * 15)), id="inf"),
    ],
)
def test_garbage_fails_loudly(gram_II: torch.Tensor) -> None:
    with pytest.raises(RunError, match="Gram"):
        SparseGPT().solve(Matrix("m", make_weight(4, 16, 0)), stats_of(gram_II), Budget(0.5))
