"""Methods that go over all matrices of a layer together: the layer keeps its zeros, if elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

import llmprune
from llmprune.arch.discover import find_units
from llmprune.arch.feedforward import feedforward
from llmprune.engine.layer import Layer, Solved
from llmprune.methods import METHODS, method_class
from llmprune.methods.weight import besa
from llmprune.methods.weight.sparsellm import _Block
from llmprune.statistics import MOMENTS, Stats
from llmprune.types import Budget, MatrixSpec, UserError
from llmprune.weights import Resident, read_matrix

NAMES = [name for name in METHODS if hasattr(method_class(name), "fit_layer")]
TEXT = tiny.tokens(6, 20, seed=3)


def zeros_by_layer(report: dict[str, Any], key: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in report["tensors"]:
        layer = ".".join(row["name"].split(".")[:3])
        found[layer] = found.get(layer, 0) + row[key]
    return found


def prune(model: Any, method: str, **settings: Any) -> llmprune.Result:
    return llmprune.prune(model, method=method, calibration=TEXT, batch_size=2, **{"sparsity": 0.5, **settings})


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("layout", ["llama", "mixtral"])
def test_every_layer_has_exactly_its_zeros(method: str, layout: str, tmp_path: Path) -> None:
    model = tiny.save(layout, tmp_path / "model")
    planned = zeros_by_layer(prune(model, method, dry_run=True).report, "planned")
    report = prune(model, method, out=tmp_path / "out").report
    assert report["verified"].startswith("reloaded")
    assert zeros_by_layer(report, "achieved") == zeros_by_layer(report, "planned") == planned
    prune(model, method, out=tmp_path / "again")
    one, other = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "again"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("method", NAMES)
def test_with_a_fit_of_the_weights_after_it(method: str) -> None:
    plain, fitted = (prune(tiny.build("llama"), method, reconstruct=epochs) for epochs in (0, 3))
    assert zeros_by_layer(plain.report, "achieved") == zeros_by_layer(fitted.report, "achieved")
    first = fitted.report["layers"][0]["fit"]
    assert first["after"] < first["before"]


@pytest.mark.parametrize("layout", ["llama", "gpt-oss"])
def test_a_fit_after_a_method_that_needs_no_text(layout: str, tmp_path: Path) -> None:
    model = tiny.save(layout, tmp_path / "model")
    plain, fitted = (
        prune(model, "magnitude", reconstruct=epochs, out=tmp_path / str(epochs)).report for epochs in (0, 3)
    )
    assert plain["calibration"] is None and fitted["calibration"] is not None
    assert zeros_by_layer(plain, "achieved") == zeros_by_layer(fitted, "achieved")
    for layer in fitted["layers"]:
        assert layer["fit"]["after"] < layer["fit"]["before"]
    one, other = (load_file(tmp_path / folder / "model.safetensors") for folder in "03")
    assert all(torch.equal(value == 0, other[key] == 0) for key, value in one.items())


@pytest.mark.parametrize("method", NAMES)
def test_what_does_not_go_with_whole_layers_is_refused(method: str) -> None:
    for settings in ({"refine": "swaps"}, {"update": "least-squares"}, {"retarget": 0.5}):
        with pytest.raises(UserError, match="works on whole layers"):
            prune(tiny.build("llama"), method, **settings)


def test_besa_has_no_patterns() -> None:
    with pytest.raises(UserError, match="no N:M patterns"):
        prune(tiny.build("llama"), "besa", sparsity=None, pattern="2:4")


# SparseLLM.


@pytest.mark.parametrize("layout", ["llama", "gemma3", "gpt2", "opt", "phi3", "gpt-neox"])
def test_the_formula_of_an_mlp_is_what_its_modules_compute(layout: str) -> None:
    model = tiny.build(layout)
    layer = find_units(model, head=False)[1].module
    form = feedforward(layer)
    assert form is not None
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for path in (form.up, form.gate, form.down):
        if path is not None:
            layer.get_submodule(path).register_forward_hook(
                lambda _, args, out, path=path: seen.__setitem__(path, (args[0], out))
            )
    with torch.no_grad():
        model(input_ids=TEXT)
    up, gate = seen[form.up][1], None if form.gate is None else seen[form.gate][1]
    if form.joined:
        gate, up = up.chunk(2, -1)
    assert torch.allclose(form.inner(gate, up), seen[form.down][0], atol=1e-6)


def test_an_mlp_of_experts_has_no_such_formula() -> None:
    assert feedforward(find_units(tiny.build("mixtral"), head=False)[0].module) is None


def block(layout: str) -> tuple[_Block, dict[str, torch.Tensor]]:
    """The MLP of a first layer, and weights of which half are gone."""
    model = tiny.build(layout)
    unit = find_units(model, head=False)[0]
    calls: list[Any] = []
    unit.module.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(input_ids=TEXT, use_cache=False)
    unit.module._forward_pre_hooks.clear()
    matrices = {
        spec.name: Solved(spec, read_matrix(Resident(model), unit, spec), Stats(spec.inputs, frozenset()), Budget(0.5))
        for spec in unit.matrices
    }
    form = feedforward(unit.module)
    assert form is not None
    found = _Block(Layer(unit, matrices, calls, []), form, 0.01)
    return found, {name: edit.weight_OI for name, edit in found.prune().items()}


@pytest.mark.parametrize("layout", ["llama", "gpt2", "phi3"])
def test_sparsellm_moves_its_free_values_to_their_minimum(layout: str) -> None:
    with torch.no_grad():
        one, weights = block(layout)
        # what SparseGPT says of a refitted target is not the loss of the matrix
        assert all(edit.loss is None for edit in one.prune().values())
        (x_TD,), (y_TD,), (before_s,), (before_z,) = one._x, one._y, one._s, one._z
        ahead_s, ahead_z = one._ahead(weights, x_TD)
        one.move(weights)
        (p_TC,), (z_TC,), (s_TC,) = one._p, one._z, one._s

    def slope(value: torch.Tensor, lost: Any) -> float:
        leaf = value.clone().requires_grad_()
        (found,) = torch.autograd.grad(lost(leaf), leaf)
        return float(found.abs().max())

    def lost_p(p: torch.Tensor) -> torch.Tensor:
        given = (one._apply(weights, one._down, p) - y_TD).square().sum()
        return given + (p - one._form.inner(before_s, before_z)).square().sum()

    assert slope(p_TC, lost_p) <= 1e-4 * slope(torch.zeros_like(p_TC), lost_p)
    if s_TC is None:
        after, before, ahead, factor = z_TC, before_z, ahead_z, 1.0
    else:

        def lost_z(z: torch.Tensor) -> torch.Tensor:
            return (p_TC - one._form.activation(before_s) * z).square().sum() + (z - ahead_z).square().sum()

        assert slope(z_TC, lost_z) <= 1e-4 * slope(torch.zeros_like(z_TC), lost_z)
        after, before, ahead, factor = s_TC, before_s, ahead_s, z_TC

    def lost_s(s: torch.Tensor) -> float:
        return float((p_TC - one._form.activation(s) * factor).square().sum() + (s - ahead).square().sum())

    assert lost_s(after) < lost_s(before)


@pytest.mark.parametrize("settings", [{"sparsity": 0.6}, {"sparsity": None, "pattern": "2:4"}])
def test_sparsellm_brings_the_mlp_closer_to_the_dense_one_than_sparsegpt(settings: dict[str, Any]) -> None:
    dense = tiny.build("llama").model.layers[0].mlp
    errors = []
    for method in ("sparsegpt", "sparsellm"):
        mlp = prune(tiny.build("llama"), method, schedule="module", **settings).model.model.layers[0].mlp
        inputs: list[torch.Tensor] = []
        hook = mlp.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
        model = prune(tiny.build("llama"), "sparsegpt", schedule="module", **settings).model
        model.model.layers[0].mlp = mlp  # the attention before it is the same
        with torch.no_grad():
            model(input_ids=TEXT, use_cache=False)
            hook.remove()
            errors.append(float((mlp(inputs[0]) - dense(inputs[0])).square().sum()))
    assert errors[1] < errors[0]


# BESA.


def choice(rows: bool) -> besa._Choice:
    generator = torch.Generator().manual_seed(0)
    stats = Stats(40, frozenset({MOMENTS}))
    stats.update(torch.randn(60, 40, generator=generator))
    spec = MatrixSpec("m", None, 7, 40, False)
    return besa._Choice(Solved(spec, torch.randn(7, 40, generator=generator), stats, Budget(0.5)), rows)


@pytest.mark.parametrize("rows", [True, False])
def test_besa_masks_a_prefix_and_its_gradient_is_that_of_the_chances(rows: bool) -> None:
    one = choice(rows)
    with torch.no_grad():
        one.logits_RD += torch.randn(one.logits_RD.shape, generator=torch.Generator().manual_seed(1))
    masked_OI = one.masked()
    cut_O = (masked_OI == 0).sum(1)
    assert bool(((masked_OI == 0) == (one.rank_OI < cut_O[:, None])).all())
    weight_OI = torch.randn(7, 40, generator=torch.Generator().manual_seed(2))
    (masked_OI * weight_OI).sum().backward()
    # by hand, weight for weight: it is kept with the probability that the sparsity is at most its rank
    logits = one.logits_RD.detach().double().requires_grad_()
    kept = 0.0
    for row in range(7):
        chance_D = logits[row if rows else 0].softmax(0)
        for column in range(40):
            below_D = torch.linspace(0, 1, 101, dtype=torch.float64) < (float(one.rank_OI[row, column]) + 0.5) / 40
            kept += chance_D[below_D].sum() * float(weight_OI[row, column] * one.dense_OI[row, column])
    kept.backward()  # type: ignore[attr-defined]
    assert float((one.logits_RD.grad - logits.grad).abs().max()) <= 1e-5 * float(logits.grad.abs().max())


def test_besa_takes_from_rows_that_do_not_matter() -> None:
    """Channels whose column of down is zero: their rows of gate and up lose more than the others."""

    def model() -> PreTrainedModel:
        found = tiny.build("llama")
        for layer in found.model.layers:
            layer.mlp.down_proj.weight.data[:, :24] = 0
        return found

    result = prune(model(), "besa", options={"epochs": 20, "rate": 0.3})
    for layer in result.model.model.layers:
        for one in (layer.mlp.gate_proj, layer.mlp.up_proj):
            share = (one.weight == 0).float().mean(1)
            assert float(share[:24].mean()) > float(share[24:].mean())
    alike = prune(model(), "besa", options={"rows": False}).model
    counts = (alike.model.layers[0].mlp.gate_proj.weight == 0).sum(1)
    # one share for all rows, up to what rounding leaves over
    assert int(counts.max() - counts.min()) <= 1
