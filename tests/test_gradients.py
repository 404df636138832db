"""Gradients taken a layer at a time are those of autograd on the whole model, and the scores are their formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import PreTrainedModel

import llmprune
from llmprune import UserError, scores
from llmprune.arch.discover import find_units
from llmprune.checkpoint.skeleton import run_experts_one_by_one
from llmprune.engine.gradient_store import STEP, Gradients
from llmprune.engine.gradients import loss_gradients, regional_gradients
from llmprune.engine.trunk import Trunk
from llmprune.methods import PRESETS, method_of
from llmprune.recipe import Recipe
from llmprune.scores import SCORES
from llmprune.statistics import GRADIENTS, MOMENTS, OF_WEIGHTS, TURNED, Stats
from llmprune.types import Gradient, Matrix
from llmprune.weights import Resident

LAYOUTS = ["llama", "gpt2", "gemma3", "qwen3-moe", "gpt-oss"]
# of unequal length, so that a mean over sequences is not one over tokens
SAMPLES = [tiny.tokens(1, length, seed=length) for length in (9, 24, 17)]
# A float64 sum over a few thousand terms, each a product of a few hundred rounded operations; the gradients are
# compared relative to the largest of their matrix.
TOLERANCE = 1e-10
OF_GRADIENTS = [name for name, score in SCORES.items() if score.needs & OF_WEIGHTS]


def exact(layout: str) -> PreTrainedModel:
    return tiny.build(layout).double()


def trunk_of(model: PreTrainedModel) -> Trunk:
    units = find_units(model, head=False)
    return Trunk(model, units, [{"input_ids": one} for one in SAMPLES], Resident(model))


def matrices_of(trunk: Trunk) -> list[list[str]]:
    return [sorted({spec.parameter.removeprefix(u.prefix) for spec in u.matrices}) for u in trunk.units]


def loss(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_gradients_are_those_of_autograd(layout: str) -> None:
    model = exact(layout)
    with run_experts_one_by_one(model):
        trunk = trunk_of(model)
        with torch.no_grad():
            found = dict(loss_gradients(trunk, matrices_of(trunk)))
        model.requires_grad_(True)
        losses = [loss(model, ids) for ids in SAMPLES]
    tokens = [ids.numel() - 1 for ids in SAMPLES]
    for index, unit in enumerate(trunk.units):
        for name, one in found[index].items():
            parameter = unit.module.get_parameter(name)
            each = [torch.autograd.grad(part, parameter, retain_graph=True)[0] for part in losses]
            # the norms of these classes round to float32, so only gradients of equal scale are equal
            expected = sum(part * count / sum(tokens) for part, count in zip(each, tokens, strict=True))
            assert close(one.mean_OI, expected), (index, name)
            assert close(one.squares_OI, sum(part.square() for part in each)), (index, name)
            assert one.samples == len(SAMPLES)
    assert len(found) == len(trunk.units)


@pytest.mark.parametrize("layout", ["llama", "qwen3-moe"])
def test_regional_gradients_are_those_of_the_norm_of_the_layer(layout: str) -> None:
    model = exact(layout)
    outputs: list[torch.Tensor] = []
    with run_experts_one_by_one(model):
        trunk = trunk_of(model)
        with torch.no_grad():
            found = dict(regional_gradients(trunk, matrices_of(trunk)))
        model.requires_grad_(True)
        for unit in trunk.units:
            # each layer on its own: nothing flows into the ones before
            unit.module.register_forward_pre_hook(lambda _, args: (args[0].detach(), *args[1:]))
            unit.module.register_forward_hook(lambda _, args, out: outputs.append(out))
        for ids in SAMPLES:
            model(input_ids=ids, use_cache=False)
    for index, unit in enumerate(trunk.units):
        mine = outputs[index :: len(trunk.units)]
        for name, one in found[index].items():
            parameter = unit.module.get_parameter(name)
            each = [torch.autograd.grad(out.norm(), parameter, retain_graph=True)[0] for out in mine]
            # the direction of the norm is rounded to float32
            error = (one.squares_OI - sum(part.square() for part in each)).abs().max()
            assert error <= 1e-5 * one.squares_OI.max(), (index, name)


def test_what_is_stored_comes_back_by_matrix_and_layout() -> None:
    model = tiny.build("gpt-oss")
    with torch.no_grad(), run_experts_one_by_one(model):
        trunk = trunk_of(model)
        specs = [spec for unit in trunk.units for spec in unit.matrices]
        stored = Gradients(model, trunk.units, trunk.batches, Resident(model), specs, GRADIENTS)
        found = dict(loss_gradients(trunk, matrices_of(trunk)))
    for spec in specs:
        index = next(i for i, unit in enumerate(trunk.units) if spec.parameter.startswith(unit.prefix))
        expected = found[index][spec.parameter.removeprefix(trunk.units[index].prefix)].mean_OI
        expected = expected if spec.index is None else expected[spec.index]
        mine = stored.of(spec, torch.device("cpu"))
        assert torch.equal(mine.mean_OI, expected.T if spec.transposed else expected)
        assert mine.samples == len(SAMPLES)


@pytest.mark.parametrize(("step", "bound"), [(STEP, 0.02), (STEP / 100, 2e-6)])
def test_the_hessian_times_the_gradient_is_that_of_double_backward(
    step: float, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A central difference along g errs by a share that falls with the square of the step."""
    monkeypatch.setattr("llmprune.engine.gradient_store.STEP", step)
    model = exact("gpt2")  # whose norms do not round to float32
    before = {name: one.clone() for name, one in model.state_dict().items()}
    trunk = trunk_of(model)
    specs = [spec for unit in trunk.units for spec in unit.matrices]
    with torch.no_grad():
        stored = Gradients(model, trunk.units, trunk.batches, Resident(model), specs, TURNED)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    model.requires_grad_(True)
    model.set_attn_implementation("eager")  # which can be differentiated twice
    parameters = [model.get_parameter(spec.parameter) for spec in specs]
    tokens = [ids.numel() - 1 for ids in SAMPLES]
    whole = sum(loss(model, ids) * count for ids, count in zip(SAMPLES, tokens, strict=True)) / sum(tokens)
    gradients = torch.autograd.grad(whole, parameters, create_graph=True)
    along = sum((one * one.detach()).sum() for one in gradients)
    for spec, expected in zip(specs, torch.autograd.grad(along, parameters), strict=True):
        found = stored.of(spec, torch.device("cpu")).turned_OI
        assert found is not None
        found = found.T if spec.transposed else found
        assert float((found - expected).abs().max()) <= bound * float(expected.abs().max()), spec.name


def example() -> tuple[Matrix, Stats]:
    generator = torch.Generator().manual_seed(0)
    gradient = Gradient(*torch.zeros(2, 5, 8))
    for _ in range(3):
        gradient.add(torch.randn(5, 8, generator=generator), 1 / 3)
    stats = Stats(8, frozenset({MOMENTS}))
    stats.update(torch.randn(30, 8, generator=generator))
    return Matrix("m", torch.randn(5, 8, generator=generator), gradient), stats


def test_scores_are_their_formulas() -> None:
    matrix, stats = example()
    assert matrix.gradient is not None
    matrix.gradient.turned_OI = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    w, g, s = (one.double() for one in (matrix.weight_OI, matrix.gradient.mean_OI, matrix.gradient.squares_OI))
    norm = (stats.square_sums_I.double() / 3).sqrt()
    root = s.sqrt()
    expected: dict[str, torch.Tensor] = {
        "fisher": w**2 * s / 3 / 2,
        "taylor": (w * g).abs(),
        "synflow": (w * g).abs(),
        "quadratic": (0.5 * s / 3 * w**2 - w * g).abs(),
        "grasp": w * matrix.gradient.turned_OI,
        "gblm": w.abs() * norm + w.abs() * 100 * root,
        "regional": w.abs() * (100 * (s / 3).sqrt() + norm),
        "pruner-zero": w**2 * (root - root.min()) / (root.max() - root.min()),
    }
    assert set(expected) == set(OF_GRADIENTS)
    for name, one in expected.items():
        found = SCORES[name].of(matrix, stats)
        assert float((found - one).abs().max()) <= 1e-5 * float(one.max()), name


def test_fisher_is_the_diagonal_of_the_outer_products() -> None:
    """½ w' diag(1/N sum g g') w, weight by weight, is the rise of ½ 1/N sum (g'w)² when one weight is removed alone."""
    generator = torch.Generator().manual_seed(1)
    each = torch.randn(6, 12, generator=generator)
    gradient = Gradient(*torch.zeros(2, 1, 12))
    for one in each:
        gradient.add(one[None], 1 / 6)
    weight = torch.randn(1, 12, generator=generator)
    found = scores.fisher(Matrix("m", weight, gradient))[0]
    for index in range(12):
        change = torch.zeros(12)
        change[index] = -weight[0, index]
        assert torch.isclose(found[index], 0.5 * (each @ change).square().mean(), rtol=1e-5)


@pytest.mark.parametrize("name", ["grasp", "wanda++"])
def test_presets_prune_a_checkpoint_exactly_and_the_same_each_time(name: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"method": name, "sparsity": 0.5, "calibration": tiny.tokens(2, 16)}
    model = tiny.save("llama", tmp_path / "model")
    result = llmprune.prune(model, out=tmp_path / "out", **settings)
    assert result.report["totals"]["zeros"] == sum(row["planned"] for row in result.report["tensors"])
    total = sum(row["shape"][0] * row["shape"][1] for row in result.report["tensors"])
    rows = sum(row["shape"][0] for row in result.report["tensors"])
    # methods that count by row round once a row
    assert abs(result.report["totals"]["zeros"] - total / 2) <= rows / 2
    spread = {row["planned"] / (row["shape"][0] * row["shape"][1]) for row in result.report["tensors"]}
    assert (len(spread) > 1) == (PRESETS[name].allocation == "global")
    assert llmprune.prune(model, out=tmp_path / "again", **settings).report["totals"] == result.report["totals"]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_head_and_half_precision_are_refused() -> None:
    model = tiny.build("gpt2")
    with pytest.raises(UserError, match="gradients underflow in float16"):
        llmprune.prune(model.half(), method="fisher", sparsity=0.5, calibration=SAMPLES[1])
    with pytest.raises(UserError, match=r"set engine\.dtype to float32"):
        llmprune.prune(model.bfloat16(), method="grasp", sparsity=0.5, calibration=SAMPLES[1])
    target = {"method": "fisher", "sparsity": 0.5, "calibration": SAMPLES[1], "targets": ["lm_head"]}
    with pytest.raises(UserError, match="leave out the output head"):
        llmprune.prune(tiny.build("mixtral"), **target)


def test_a_method_with_gradients_names_them() -> None:
    for name in OF_GRADIENTS:
        assert method_of(Recipe(method="scored", options={"score": name})).needs & OF_WEIGHTS
