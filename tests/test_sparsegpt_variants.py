"""The sweep for any mask, ROSE's order of columns, and weights on a grid."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from budgets import TWO_OF_4, label
from draws import normal
from solver_problems import BUDGETS, apart, damped64, inputs_of, stats_of

from llmprune import masks
from llmprune.kernels.sparsegpt_block import solve_block
from llmprune.linalg import reversed_cholesky, scaled
from llmprune.methods import method_of
from llmprune.methods.weight.sparsegpt import SparseGPT, rose_order
from llmprune.recipe import Recipe
from llmprune.solvers.sweep import sweep_mask
from llmprune.statistics import GRAM, Stats
from llmprune.types import Budget, Matrix, UserError

# --- the sweep on a given mask ---


@pytest.mark.parametrize("budget", BUDGETS, ids=label)
def test_the_sweep_on_sparsegpts_own_mask_is_sparsegpt(budget: Budget) -> None:
    # inputs of equal size: then the damping of the unit-diagonal form is that of the mean
    x_TI = inputs_of(136)
    stats = stats_of(x_TI / x_TI.norm(dim=0))
    weight_OI = normal(20, 136)
    edit = SparseGPT().solve(Matrix("m", weight_OI), stats, budget)
    found_OI = sweep_mask(weight_OI, edit.pruned_OI, scaled(stats.gram_lower_II, 0.01))
    # float32, condition of some thousands
    assert apart(found_OI, edit.weight_OI.double().numpy()) < 1e-4
    assert not bool(found_OI[edit.pruned_OI].any())


# --- SparseGPT's options ---


def test_rose_order_is_descending_loss_and_only_where_blocks_differ() -> None:
    stats = stats_of(normal(500, 40))
    factor = reversed_cholesky(stats.gram_lower_II, 0.01)
    weight_OI = normal(8, 40)
    assert rose_order(weight_OI, factor, Budget(0.5), 8) is None
    weight_OI[:, 16:24] *= 5
    order_I = rose_order(weight_OI, factor, Budget(0.5), 8)
    assert order_I is not None and sorted(order_I.tolist()) == list(range(40))
    assert set(order_I[:8].tolist()) == set(range(16, 24))
    score_OI = (weight_OI * factor.r_t_II.diagonal()).square()
    for block_B in order_I.split(8):
        block_B = block_B.sort().values
        pruned_OB = masks.select(score_OI[:, block_B], Budget(0.5), by="matrix")
        loss_B = (score_OI[:, block_B] * pruned_OB).sum(0)
        at = {int(column): float(one) for column, one in zip(block_B, loss_B, strict=True)}
        ordered = [at[int(column)] for column in order_I if int(column) in at]
        assert ordered == sorted(ordered, reverse=True)


@pytest.mark.parametrize("budget", BUDGETS, ids=label)
def test_rose_is_the_textbook_on_reordered_columns(budget: Budget) -> None:
    x_TI = inputs_of(48)
    x_TI[:, 32:40] *= 8
    stats, weight_OI = stats_of(x_TI), normal(10, 48)
    order_I = rose_order(weight_OI, reversed_cholesky(stats.gram_lower_II, 0.01), budget, 16)
    assert order_I is not None
    edit = SparseGPT(block=16, order="rose").solve(Matrix("m", weight_OI), stats, budget)
    pattern = budget.pattern
    reference = oracles.sparsegpt(
        weight_OI[:, order_I].numpy(),
        stats.gram_II.double().numpy()[np.ix_(order_I, order_I)],
        sparsity=budget.sparsity,
        keep=pattern.keep,
        group=pattern.group,
        block=16,
    )
    assert reference.gap > 1e-4
    np.testing.assert_array_equal(edit.pruned_OI[:, order_I].numpy(), reference.pruned_OI)
    assert apart(edit.weight_OI[:, order_I], reference.weight_OI) < 1e-4
    assert edit.notes == {"order": "rose"}
    if pattern.structured:
        kept_OG = (~edit.pruned_OI).unflatten(1, (-1, pattern.group)).sum(2)
        assert bool((kept_OG == pattern.keep).all())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("budget", [Budget(0.0), Budget(0.5), TWO_OF_4], ids=label)
def test_quantized_weights_lie_on_the_reported_grid(budget: Budget, bits: int) -> None:
    stats, weight_OI = stats_of(inputs_of(48)), normal(10, 48)
    edit = SparseGPT(bits=bits, block=16).solve(Matrix("m", weight_OI), stats, budget)
    grid = edit.notes["grid"]
    assert grid["bits"] == bits and len(grid["scale"]) == len(grid["zero"]) == 10
    level_OI = edit.weight_OI.double().numpy() / np.array(grid["scale"])[:, None] + np.array(grid["zero"])[:, None]
    # a float32 product and the difference that it is read back from: 2^-22 of up to 256 levels
    np.testing.assert_allclose(level_OI, level_OI.round(), atol=1e-4)
    assert level_OI.min() > -0.5 and level_OI.max() < 2**bits - 0.5
    assert int(edit.pruned_OI.sum()) == budget.pruned_of(480) and not bool(edit.weight_OI[edit.pruned_OI].any())


def test_later_columns_make_up_for_rounding() -> None:
    stats, weight_OI = stats_of(inputs_of(48)), normal(10, 48)
    h_II = damped64(stats)
    edit = SparseGPT(bits=4).solve(Matrix("m", weight_OI), stats, Budget(0.0))
    grid = edit.notes["grid"]
    scale, zero = (torch.tensor(grid[name])[:, None] for name in ("scale", "zero"))
    nearest_OI = ((weight_OI / scale).round() + zero).clamp(0, 15).sub(zero) * scale
    swept, plain = (oracles.quadratic(weight_OI, one, h_II) for one in (edit.weight_OI, nearest_OI))
    assert swept < plain
    # the loss that the sweep adds up is the quadratic form
    assert edit.loss == pytest.approx(
        oracles.quadratic(weight_OI, edit.weight_OI, stats.gram_II.double().numpy()), rel=1e-4
    )


def test_a_given_mask_goes_through_the_block_unchanged() -> None:
    current_BO, pruned_BO = normal(16, 5), normal(16, 5, seed=1) > 0
    before_BO = pruned_BO.clone()
    solve_block(current_BO, torch.eye(16), pruned_BO, None)
    assert torch.equal(pruned_BO, before_BO)
    assert torch.equal(current_BO, normal(16, 5).masked_fill(before_BO, 0))


@pytest.mark.parametrize("step", [{"update": "least-squares"}, {"refine": "swaps"}, {"reconstruct": 1}], ids=str)
def test_a_grid_is_not_left_again(step: dict[str, object]) -> None:
    with pytest.raises(UserError, match="grid"):
        method_of(Recipe(method="sparsegpt", options={"bits": 4}, **step))


@pytest.mark.parametrize("bits", [2, 4])
def test_weights_lie_on_the_grid_of_the_report(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TI, weight_OI = torch.randn(512, 96, generator=generator), torch.randn(16, 96, generator=generator)
    stats = Stats(96, frozenset({GRAM}))
    stats.update(x_TI)
    edit = SparseGPT(bits=bits).solve(Matrix("m", weight_OI), stats, Budget(0.5))
    grid = edit.notes["grid"]
    levels_OL = torch.arange(2**bits) - torch.tensor(grid["zero"])[:, None]
    values_OL = levels_OL * torch.tensor(grid["scale"])[:, None]
    assert bool((edit.weight_OI[:, :, None] == values_OL[:, None, :]).any(2).all())
