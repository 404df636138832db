"""Allocators: exact budgets, and each against its definition in float64."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runner import cli
from torch import nn

import llmprune
from llmprune.allocation import ALLOCATORS, Dense, dlp
from llmprune.allocation.alphapruning import tail_exponent
from llmprune.allocation.arithmetic import RISE, arithmetic
from llmprune.allocation.dynamic import divided, dynamic, knapsack
from llmprune.allocation.evopress import MANY, evolve
from llmprune.allocation.fit import MOST, fit
from llmprune.allocation.owl import OUTLYING, REACH
from llmprune.arch.discover import find_units
from llmprune.checkpoint.skeleton import run_experts_one_by_one
from llmprune.engine.divergence import divergences
from llmprune.engine.trunk import Trunk
from llmprune.statistics import GRAM, Stats
from llmprune.types import Budget, MatrixSpec, UserError
from llmprune.weights import Resident

DEMO = Path(llmprune.__file__).parent / "demo" / "model"
SPREADING = [name for name in ALLOCATORS if name != "uniform"]


def specs_of(sizes: list[int]) -> list[MatrixSpec]:
    return [MatrixSpec(f"m{number}", None, size, 1, False) for number, size in enumerate(sizes)]


def no_divergence(variants: Any, sequences: int) -> list[float]:
    raise AssertionError("no variant is asked for")


def planned(model: Any, allocation: str, sparsity: float, **settings: Any) -> dict[str, tuple[int, int]]:
    """Zeros and weights of every matrix, from a dry run with magnitude pruning."""
    report = llmprune.prune(
        model,
        method="magnitude",
        sparsity=sparsity,
        allocation=allocation,
        calibration=tiny.tokens(),
        dry_run=True,
        **settings,
    ).report
    return {row["name"]: (row["planned"], row["shape"][0] * row["shape"][1]) for row in report["tensors"]}


# --- the budget ---


@settings(max_examples=50, deadline=None, database=None, derandomize=True)
@given(
    parts=st.lists(st.tuples(st.integers(1, 500), st.floats(-1, 1)), min_size=1, max_size=8),
    sparsity=st.floats(0, 0.98),
    shifted=st.booleans(),
)
def test_the_budget_is_exact_whatever_is_wished(parts: list[tuple[int, float]], sparsity: float, shifted: bool) -> None:
    specs = specs_of([size for size, _ in parts])
    wishes = {spec.name: one if shifted else 0.1 + abs(one) for spec, (_, one) in zip(specs, parts, strict=True)}
    found = fit(
        specs,
        Budget(sparsity),
        lambda level: {name: level + one if shifted else level * one for name, one in wishes.items()},
    )
    zeros = [found[spec.name].pruned_of(spec.count) for spec in specs]
    assert sum(zeros) == Budget(sparsity).pruned_of(sum(spec.count for spec in specs))
    assert all(0 <= one <= MOST * spec.count + 1 for one, spec in zip(zeros, specs, strict=True))
    # who wishes for more gets no less, up to the one weight of rounding
    share = {spec.name: one / spec.count for spec, one in zip(specs, zeros, strict=True)}
    for a in specs:
        for b in specs:
            if wishes[a.name] >= wishes[b.name]:
                assert share[a.name] >= share[b.name] - 1 / a.count - 1 / b.count


def test_what_cannot_be_reached_is_refused() -> None:
    specs = specs_of([100, 100])
    with pytest.raises(UserError, match=r"sparsity 0\.995 is out of reach"):
        fit(specs, Budget(0.995), lambda level: {spec.name: level for spec in specs})


@pytest.mark.parametrize(
    ("layout", "allocation"),
    # one that solves every matrix at every level is tried once
    [one for one in itertools.product(["llama", "mixtral", "gpt2"], SPREADING) if one[1] not in ("dynamic", "evopress")]
    + [("llama", "dynamic")],
)
def test_every_allocator_spends_the_budget_of_a_model(layout: str, allocation: str) -> None:
    model = tiny.build(layout)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    for sparsity in (0.0, 0.6):
        found = planned(model, allocation, sparsity)
        total = sum(size for _, size in found.values())
        assert sum(zeros for zeros, _ in found.values()) == Budget(sparsity).pruned_of(total)
    assert len({round(zeros / size, 3) for zeros, size in found.values()}) > 1
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


@pytest.mark.parametrize("allocation", ["owl", "error"])
def test_streamed_and_resident_models_get_the_same_amounts(allocation: str, tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    assert planned(str(folder), allocation, 0.6) == planned(tiny.build("llama"), allocation, 0.6)


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_a_model_is_pruned_by_what_was_measured(method: str, tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    settings = {"method": method, "sparsity": 0.6, "allocation": "owl", "calibration": tiny.tokens()}
    plan = llmprune.prune(str(folder), dry_run=True, **settings).report
    report = llmprune.prune(str(folder), out=tmp_path / "out", **settings).report
    assert [row["achieved"] for row in report["tensors"]] == [row["planned"] for row in plan["tensors"]]
    assert [row["planned"] for row in report["tensors"]] == [row["planned"] for row in plan["tensors"]]
    # magnitude itself still reads nothing
    assert all((row["tokens"] is None) == (method == "magnitude") for row in report["tensors"])


@pytest.mark.parametrize("allocation", SPREADING)
def test_a_pattern_is_refused(allocation: str, tmp_path: Path) -> None:
    # before any text goes through the model, and before anything is written
    ran = cli("prune", DEMO, "--out", tmp_path / "out", "--pattern", "2:4", "--allocation", allocation)
    assert ran.code == 2 and f"allocation '{allocation}' needs a sparsity" in ran.err.replace("\n", " ")
    assert not list(tmp_path.iterdir())


# --- each by its definition ---


def layers_of(model: nn.Module) -> list[dict[str, nn.Linear]]:
    return [
        {name: one for name, one in layer.named_modules() if isinstance(one, nn.Linear)} for layer in model.model.layers
    ]


def inputs_of(model: nn.Module) -> dict[nn.Linear, np.ndarray]:
    """What every linear of the layers sees of the calibration text, by forward hooks."""
    seen: dict[nn.Linear, list[np.ndarray]] = {}
    hooks = [
        one.register_forward_pre_hook(
            lambda module, args: seen.setdefault(module, []).append(args[0].flatten(0, 1).double().numpy())
        )
        for layer in layers_of(model)
        for one in layer.values()
    ]
    with torch.no_grad():
        for sequence in tiny.tokens():
            model(input_ids=sequence[None])
    for hook in hooks:
        hook.remove()
    return {module: np.concatenate(parts) for module, parts in seen.items()}


def shares(found: dict[str, tuple[int, int]]) -> list[list[float]]:
    """Sparsity of every matrix, by layer."""
    by_layer: dict[str, list[float]] = {}
    for name, (zeros, size) in found.items():
        by_layer.setdefault(name.split(".")[2], []).append(zeros / size)
    return list(by_layer.values())


def test_owl_by_its_definition() -> None:
    model = tiny.build("llama")
    with torch.no_grad():  # something to find: a few inputs of one layer are much larger
        model.model.layers[1].input_layernorm.weight[:3] *= 20
        model.model.layers[2].mlp.up_proj.weight[:2] *= 30
    inputs, outlying = inputs_of(model), []
    for layer in layers_of(model):
        score_N = np.concatenate(
            [
                (one.weight.detach().abs().double().numpy() * np.linalg.norm(inputs[one], axis=0)).ravel()
                for one in layer.values()
            ]
        )
        outlying.append(float(np.mean(score_N > OUTLYING * score_N.mean())))
    assert len(set(outlying)) == 3
    found = shares(planned(model, "owl", 0.6))
    for amounts in found:
        assert max(amounts) - min(amounts) < 2 / 512  # one amount a layer, but for rounding
    wish = [-2 * REACH * (one - min(outlying)) / (max(outlying) - min(outlying)) for one in outlying]
    # all layers are of one size, and nothing is clamped
    expected = [0.6 + one - np.mean(wish) for one in wish]
    np.testing.assert_allclose([np.mean(amounts) for amounts in found], expected, atol=2 / 512)


def test_dlp_by_its_definition() -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight *= 2
        model.model.layers[2].mlp.up_proj.weight *= 3
    inputs, medians = inputs_of(model), []
    for layer in layers_of(model):
        score_N = np.concatenate(
            [
                (one.weight.detach().abs().double().numpy() * np.linalg.norm(inputs[one], axis=0)).ravel()
                for one in layer.values()
            ]
        )
        medians.append(float(np.sort(score_N)[(len(score_N) - 1) // 2]))
    found = [np.mean(amounts) for amounts in shares(planned(model, "dlp", 0.6))]
    wish = [2 * dlp.REACH * (one - min(medians)) / (max(medians) - min(medians)) for one in medians]
    np.testing.assert_allclose(found, [0.6 + one - np.mean(wish) for one in wish], atol=2 / 512)


@given(
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    target=st.integers(0, 12),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None, database=None, derandomize=True)
def test_the_knapsack_is_the_best_of_all_choices(sizes: tuple[int, int], target: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    costs, gains = random.integers(0, 9, sizes).astype(float), random.integers(0, 6, sizes)
    found = knapsack(costs, gains, target)
    rows = range(sizes[0])
    choices = itertools.product(range(sizes[1]), repeat=sizes[0])
    allowed = [one for one in choices if sum(gains[row, one[row]] for row in rows) >= target]
    assert (found is None) == (not allowed)
    if found is not None:
        assert sum(gains[row, found[row]] for row in rows) >= target
        best = min(sum(costs[row, one[row]] for row in rows) for one in allowed)
        assert sum(costs[row, found[row]] for row in rows) == best


@pytest.mark.parametrize("matrices", [3, 900])
def test_zeros_of_many_small_matrices_add_up(matrices: int) -> None:
    """Where a matrix has less than one bucket, those of all are still the level's share, and any budget can be reached."""
    counts, levels = np.full(matrices, 64), np.array([0.0, 0.3, 0.6, 0.99])
    zeros = divided(counts, levels, 100)
    assert zeros.min() >= 0 and zeros.sum(0).tolist() == [0, 30, 60, 99]
    assert knapsack(np.tile(levels, (matrices, 1)), zeros, 99) is not None


def test_dynamic_spares_the_matrix_that_cannot_be_pruned() -> None:
    """Inputs of one matrix repeat one another, so that it loses nothing; those of another are all its own."""
    generator = torch.Generator().manual_seed(0)
    specs = specs_of([1, 1])
    specs = [dataclasses.replace(spec, outputs=16, inputs=16) for spec in specs]
    weight_OI = torch.randn(16, 16, generator=generator)
    stats = [Stats(16, frozenset({GRAM})) for _ in specs]
    stats[0].update(torch.randn(400, 2, generator=generator).repeat(1, 8))
    stats[1].update(torch.randn(400, 16, generator=generator))

    def measure(kinds: frozenset[str], look: Any) -> None:
        for number, (spec, one) in enumerate(zip(specs, stats, strict=True)):
            look(number, lambda spec=spec, one=one: [(spec, weight_OI, one)])

    found = dynamic(Dense([[spec] for spec in specs], list, list, measure, no_divergence), Budget(0.5))
    easy, hard = (found[spec.name].sparsity for spec in specs)
    assert easy > hard + 0.2
    assert sum(found[spec.name].pruned_of(256) for spec in specs) == 256


def distribution(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=tiny.tokens()).logits
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("layout", ["llama", "mixtral"])
def test_a_divergence_is_that_of_the_whole_models(layout: str) -> None:
    model = tiny.build(layout)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    logp = distribution(model)
    units = find_units(model, head=False)
    matrices = [spec for unit in units for spec in unit.matrices]
    changes = {spec.name: 0.3 * torch.rand(spec.outputs, spec.inputs) for spec in (matrices[1], matrices[-1])}
    with torch.no_grad(), run_experts_one_by_one(model):
        trunk = Trunk(model, units, [{"input_ids": tiny.tokens()}], Resident(model))
        found = divergences(trunk, [lambda specs: {}, lambda specs: changes])
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    with torch.no_grad():
        for spec in (matrices[1], matrices[-1]):
            parameter = model.get_parameter(spec.parameter)
            (parameter if spec.index is None else parameter[spec.index]).copy_(changes[spec.name])
    expected = float((logp.exp() * (logp - distribution(model))).sum(-1).mean())
    assert found[0] == 0.0 and expected > 1e-3
    assert found[1] == pytest.approx(expected, rel=1e-4)


def test_evolution_finds_what_brute_force_finds() -> None:
    zeros = [[0, 4, 8, 12, 16]] * 3
    found = evolve(lambda choices, _: [trouble(one) for one in choices], zeros, random.Random(0))
    best = min(trouble(one) for one in itertools.product(range(5), repeat=3) if sum(one) == 6)
    assert sum(found) == 6 and trouble(found) == best


def test_a_parent_gives_way_only_to_what_is_better_on_more_text() -> None:
    misled = evolve(
        lambda choices, sequences: [trouble(one) * (1 if sequences == MANY else -1) for one in choices],
        [[0, 4, 8, 12, 16]] * 3,
        random.Random(0),
    )
    assert trouble(misled) <= trouble([2, 2, 2])


def trouble(choice: Sequence[int]) -> float:
    """The first matrix can go, the others suffer, and more than in sum when both do."""
    a, b, c = choice
    return 0.1 * a**2 + b**2 + c**2 + 2 * b * c


def test_evopress_ends_closer_to_the_dense_model_than_equal_amounts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune.allocation.evopress.GENERATIONS", 4)
    logp = distribution(tiny.build("llama"))
    away = {}
    for allocation in ("uniform", "evopress"):
        model = tiny.build("llama")
        report = llmprune.prune(
            model, method="sparsegpt", sparsity=0.6, allocation=allocation, calibration=tiny.tokens()
        ).report
        away[allocation] = float((logp.exp() * (logp - distribution(model))).sum(-1).mean())
        sizes = [row["shape"][0] * row["shape"][1] for row in report["tensors"]]
        # sparsegpt rounds once in each block of columns
        assert abs(sum(row["achieved"] for row in report["tensors"]) - 0.6 * sum(sizes)) <= len(sizes)
    assert away["evopress"] < away["uniform"]
    with pytest.raises(UserError, match="leave out the output head"):
        llmprune.prune(
            tiny.build("mixtral"), method="magnitude", sparsity=0.5, allocation="evopress", targets=["lm_head", "q_proj"],
            calibration=tiny.tokens(),
        )  # fmt: skip


def test_error_by_its_definition() -> None:
    model = tiny.build("llama")
    inputs, lost, sizes = inputs_of(model), [], []
    for layer in layers_of(model):
        for one in layer.values():
            weight, x_TI = one.weight.detach().double().numpy(), inputs[one]
            gone = oracles.lowest_of_rows(
                np.abs(weight) * np.linalg.norm(x_TI, axis=0), Budget(0.6).pruned_of(weight.shape[1])
            )
            lost.append(np.sum((x_TI @ (weight * gone).T) ** 2) / np.sum((x_TI @ weight.T) ** 2))
            sizes.append(weight.size)
    wish = 1 - np.array(lost) / np.sum(lost)
    expected = wish * 0.6 * np.sum(sizes) / np.sum(wish * sizes)
    found = {name: zeros / size for name, (zeros, size) in planned(model, "error", 0.6).items()}
    names = [f"model.layers.{n}.{name}.weight" for n, layer in enumerate(layers_of(model)) for name in layer]
    np.testing.assert_allclose([found[name] for name in names], expected, atol=2 / 512)


def test_arithmetic_rises_by_equal_steps() -> None:
    specs = specs_of([1000] * 5)
    dense = Dense([[spec] for spec in specs], list, list, lambda kinds, look: None, no_divergence)
    found = [arithmetic(dense, Budget(0.7))[spec.name].sparsity for spec in specs]
    np.testing.assert_allclose(found, 0.7 + RISE * (np.arange(5) / 4 - 0.5), atol=1e-3)


@pytest.mark.parametrize("alpha", [1.8, 2.5, 4.0])
def test_the_exponent_of_a_power_law_is_found(alpha: float) -> None:
    generator = np.random.default_rng(0)
    # squared singular values drawn by the inverse of the distribution function, all of them tail
    values = (1 - (np.arange(600) + 0.5) / 600) ** (-1 / (alpha - 1))
    left, right = (np.linalg.qr(generator.standard_normal((n, 600)))[0] for n in (600, 800))
    weight = left @ np.diag(np.sqrt(values)) @ right.T
    for matrix in (weight, weight.T):
        found = tail_exponent(torch.from_numpy(matrix.astype(np.float32)))
        # Hill's estimate over n values has a standard error of (alpha - 1) / sqrt(n)
        assert found == pytest.approx(alpha, abs=3 * (alpha - 1) / 600**0.5)


def test_heavier_tails_keep_more() -> None:
    model = tiny.build("llama")
    found = [np.mean(amounts) for amounts in shares(planned(model, "alphapruning", 0.5))]
    exponents = [np.mean([tail_exponent(one.weight.detach()) for one in layer.values()]) for layer in layers_of(model)]
    assert np.argsort(found).tolist() == np.argsort(exponents).tolist()
    assert max(found) / min(found) == pytest.approx(1.2 / 0.8, rel=0.02)


def test_the_command_line_names_them(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    ran = cli(
        "prune", folder, "--dry-run", "--json", "--method", "random", "--sparsity", 0.5, "--allocation", "arithmetic"
    )
    assert ran.code == 0, ran.err
    assert len({row["planned"] / np.prod(row["shape"]) for row in json.loads(ran.out)["tensors"]}) > 1
