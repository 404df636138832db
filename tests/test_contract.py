"""What every composition of method, refinement, update and pattern must satisfy, on matrices small enough to
try every mask of."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np
import oracles
import pytest
import torch
from draws import normal
from pairwise import pairwise

from llmprune.linalg import scaled
from llmprune.methods import METHODS, PRESETS, method_class, method_of
from llmprune.methods.composed import REFINEMENTS, UPDATES
from llmprune.recipe import Recipe
from llmprune.solvers.least_squares import least_squares
from llmprune.solvers.retarget import retarget
from llmprune.solvers.swaps import swaps
from llmprune.statistics import DRIFT, GRAM, KINDS, Stats
from llmprune.types import Budget, Edit, Gradient, Matrix, Pattern, in_blocks

WEIGHT = [name for name in (*METHODS, *PRESETS) if method_class(name).kind == "weight"]
# Methods that go over whole layers are tested on layers (test_layers.py).
NAMES = [
    name for name in WEIGHT if method_class(name).output == "plain" and not hasattr(method_class(name), "fit_layer")
]
# Their mask comes from an iteration that moves kept weights, so a second run is free to choose another.
NOT_IDEMPOTENT = {"admm", "alps", "auto"}
# Its scores are of either sign, so that a weight that is gone, with its 0, is not the lowest.
NOT_IDEMPOTENT |= {"grasp"}
# Scores that do not look at the weights choose the mask from before its refinement once more.
BLIND = {"activation", "random"}
REFINE = ["none", *REFINEMENTS]
UPDATE = ["none", *UPDATES]
BUDGETS = {"0.3": Budget(0.3), "0.7": Budget(0.7)} | {
    text: Budget.of(None, Pattern.parse(text)) for text in ("2:4", "4:8", "1:4")
}
STRENGTHS = [0.0, 0.5]
COMPOSED = pairwise(list(BUDGETS), REFINE, UPDATE, STRENGTHS)
# What the brute force goes through.
SMALL = {"0.5": Budget(0.5), "2:4": BUDGETS["2:4"]}


class Data(NamedTuple):
    weight_OI: torch.Tensor
    stats: Stats
    gradient: Gradient
    curvature_OO: torch.Tensor


def data(outputs: int, inputs: int, seed: int = 0) -> Data:
    """Correlated inputs of unequal size with a mean, beside those that a dense model would see."""
    x_TI = normal(3 * inputs, inputs, seed=seed) @ (torch.eye(inputs) + 0.2 * normal(inputs, inputs, seed=seed + 1))
    x_TI = (x_TI + 0.3) * normal(inputs, seed=seed + 2).exp()
    stats = Stats(inputs, KINDS)
    stats.update(x_TI, x_TI + 0.1 * normal(*x_TI.shape, seed=seed + 3))
    gradient = Gradient(*torch.zeros(2, outputs, inputs))
    rows = in_blocks(gradient.mean_OI)
    gradient.blocks_RNBB = rows.new_zeros(*rows.shape, rows.shape[-1])
    for number in range(4):
        gradient.add(normal(outputs, inputs, seed=seed + 5 + number), 0.25)
    gradient.turned_OI = normal(outputs, inputs, seed=seed + 9)
    at_outputs_TO = normal(3 * inputs, outputs, seed=seed + 10) * normal(outputs, seed=seed + 11).exp()
    return Data(normal(outputs, inputs, seed=seed + 4), stats, gradient, at_outputs_TO.T @ at_outputs_TO)


def run(name: str, made: Data, budget: Budget, refine: str, update: str, strength: float = 0.0) -> Edit:
    method = method_of(Recipe(method=name, refine=refine, update=update, retarget=strength))
    return method.solve(Matrix("m", made.weight_OI, made.gradient, made.curvature_OO), made.stats, budget)


def loss(made: Data, weight_OI: torch.Tensor) -> float:
    """‖X(W - Ŵ)ᵀ‖²."""
    gram_II = made.stats.gram_II.double().numpy()
    return oracles.quadratic(made.weight_OI.numpy(), weight_OI.numpy(), gram_II)


@pytest.mark.parametrize("name", NAMES)
def test_every_composition_keeps_the_contract(name: str) -> None:
    made = data(6, 24)
    for text, refine, update, strength in COMPOSED:
        budget = BUDGETS[text]
        what = f"{name} {text} {refine} {update} {strength}"
        before_OI = made.weight_OI.clone()
        edit = run(name, made, budget, refine, update, strength)
        assert torch.equal(made.weight_OI, before_OI), what
        method = method_of(Recipe(method=name, refine=refine, update=update))
        assert edit.weight_OI.dtype == torch.float32 and edit.pruned_OI.dtype == torch.bool, what
        assert int(edit.pruned_OI.sum()) == method.planned(6, 24, budget), what
        assert bool(torch.isfinite(edit.weight_OI).all()), what
        assert not bool(edit.weight_OI[edit.pruned_OI].any()), what
        if budget.pattern.structured:
            kept_OG = (~edit.pruned_OI).unflatten(1, (-1, budget.pattern.group)).sum(2)
            assert bool((kept_OG == budget.pattern.keep).all()), what
        again = run(name, made, budget, refine, update, strength)
        assert torch.equal(again.weight_OI, edit.weight_OI) and torch.equal(again.pruned_OI, edit.pruned_OI), what


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("update", UPDATE)
def test_at_zero_the_dense_matrix_comes_back(name: str, update: str) -> None:
    made = data(6, 24)
    for budget in (Budget(0.0), Budget.of(None, Pattern(4, 4))):
        edit = run(name, made, budget, "swaps", update, 1.0)
        assert not bool(edit.pruned_OI.any())
        assert torch.equal(edit.weight_OI, made.weight_OI)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NOT_IDEMPOTENT])
def test_pruning_again_keeps_the_mask(name: str) -> None:
    made = data(6, 24)
    for text, refine, update in pairwise(list(BUDGETS), ["none"] if name in BLIND else REFINE, UPDATE):
        once = run(name, made, BUDGETS[text], refine, update)
        twice = run(name, made._replace(weight_OI=once.weight_OI), BUDGETS[text], refine, update)
        assert torch.equal(once.pruned_OI, twice.pruned_OI), f"{text} {refine} {update}"


@pytest.mark.parametrize("name", NAMES)
def test_no_composition_beats_the_best_of_all_masks(name: str) -> None:
    made = data(3, 8, seed=10)
    weight_OI, gram_II = made.weight_OI.double().numpy(), made.stats.gram_II.double().numpy()
    for text, budget in SMALL.items():
        pattern = budget.pattern
        method = method_of(Recipe(method=name))
        count = method.planned(3, 8, budget)
        best = oracles.best_matrix_loss(weight_OI, gram_II, count, pattern.group, pattern.keep)
        reached = {
            (refine, update): loss(made, run(name, made, budget, refine, update).weight_OI)
            for refine, update in product(REFINE, UPDATE)
        }
        # float32 weights: each errs by 2^-24 of itself, the quadratic form by the square root of what it is apart
        assert min(reached.values()) >= best * (1 - 1e-5), f"{text} {reached} {best}"


@pytest.mark.parametrize("update", list(UPDATES))
@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "random"])
def test_least_squares_is_the_best_update_of_a_mask(name: str, update: str) -> None:
    made = data(6, 40)
    h_II = (made.stats.gram_II + 0.01 * torch.diag(made.stats.square_sums_I)).double().numpy()
    for budget in BUDGETS.values():
        edit = run(name, made, budget, "none", update)
        best_OI = oracles.masked_least_squares(made.weight_OI.numpy(), h_II, edit.pruned_OI.numpy())
        best = oracles.quadratic(made.weight_OI.numpy(), best_OI, h_II)
        reached = oracles.quadratic(made.weight_OI.numpy(), edit.weight_OI.numpy(), h_II)
        assert best * (1 - 1e-6) <= reached
        if update == "exact":
            np.testing.assert_allclose(edit.weight_OI.numpy(), best_OI, atol=1e-5)
        if update == "least-squares":
            # the gradient on the kept weights has shrunk to 1e-4; the loss is quadratic in it
            assert reached <= best * (1 + 1e-4)


def test_least_squares_against_lstsq_on_the_kept_columns() -> None:
    x_TI, weight_OI = normal(90, 20, seed=1), normal(5, 20, seed=2)
    stats = Stats(20, frozenset({GRAM}))
    stats.update(x_TI)
    pruned_OI = normal(5, 20, seed=3) > 0
    system = scaled(stats.gram_lower_II, 1e-6)
    found_OI = least_squares(weight_OI, pruned_OI, system, steps=200)
    x, weight = x_TI.double().numpy(), weight_OI.double().numpy()
    for row in range(5):
        kept = ~pruned_OI[row].numpy()
        best_K = np.linalg.lstsq(x[:, kept], x @ weight[row], rcond=None)[0]
        np.testing.assert_allclose(found_OI[row].numpy()[kept], best_K, atol=2e-4)


@pytest.mark.parametrize("text", BUDGETS)
@pytest.mark.parametrize("seed", range(3))
def test_swaps_only_lower_the_error_and_keep_the_counts(text: str, seed: int) -> None:
    made, budget = data(7, 40, seed=20 * seed), BUDGETS[text]
    system = scaled(made.stats.gram_lower_II, 0.01)
    h_II = (made.stats.gram_II + 0.01 * torch.diag(made.stats.square_sums_I)).double().numpy()
    start_OI = run("wanda", made, budget, "none", "none").pruned_OI
    group = budget.pattern.group or 40
    last = np.inf
    for rounds in (0, 1, 2, 4, 40):
        pruned_OI = swaps(made.weight_OI, start_OI, system, budget, rounds)
        counts = (one.unflatten(1, (-1, group)).sum(2) for one in (pruned_OI, start_OI))
        assert torch.equal(*counts)
        now = oracles.quadratic(made.weight_OI.numpy(), made.weight_OI.masked_fill(pruned_OI, 0).numpy(), h_II)
        assert now <= last * (1 + 1e-6)
        last = now
    assert now < oracles.quadratic(made.weight_OI.numpy(), made.weight_OI.masked_fill(start_OI, 0).numpy(), h_II)


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
def test_retarget_solves_its_normal_equations(strength: float) -> None:
    x_TI, weight_OI = normal(90, 20, seed=1), normal(5, 20, seed=2)
    dense_TI = x_TI + 0.3 * normal(90, 20, seed=3)
    stats = Stats(20, frozenset({GRAM, DRIFT}))
    stats.update(x_TI, dense_TI)
    found_OI = retarget(weight_OI, stats.pull_OI(weight_OI), scaled(stats.gram_lower_II, 0.01), strength)
    x, dense, weight = x_TI.double().numpy(), dense_TI.double().numpy(), weight_OI.double().numpy()
    ridge_II = 0.01 * np.diag((x**2).sum(0))
    # min over V of |dense W' - X V'|² + |V - W|²_L, then the share of the way that was asked for
    best_OI = np.linalg.solve(x.T @ x + ridge_II, (weight @ (dense.T @ x) + weight @ ridge_II).T).T
    np.testing.assert_allclose(found_OI.numpy(), weight + strength * (best_OI - weight), atol=1e-5)
