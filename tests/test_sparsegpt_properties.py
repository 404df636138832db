"""What holds for SparseGPT whatever the matrix: closed forms, brute force, equal bits, bad conditions."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from budgets import FOUR_OF_8, TWO_OF_4, label
from sparsegpt_problems import (
    BUDGETS,
    CLEAR,
    KINDS,
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
from llmprune.statistics import Stats
from llmprune.types import Budget, Matrix, Pattern, RunError

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
