"""Synaptic flow: nothing of it is lost on the way, and it is that of a Llama written out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

import llmprune
from llmprune import UserError
from llmprune.arch.discover import find_units
from llmprune.engine.flow import flow_gradients
from llmprune.engine.trunk import Trunk
from llmprune.types import RunError
from llmprune.weights import Resident

ONE = [{"input_ids": torch.zeros(1, 1, dtype=torch.int64)}]
# sums of a few thousand products in float64
TOLERANCE = 1e-9
FLOWING = ["llama", "qwen3", "gemma3", "opt", "gpt2", "gpt-neox", "phi3", "falcon", "bloom"]


def flows(layout: str) -> dict[str, torch.Tensor]:
    """|w| dR/d|w| of every matrix."""
    model = tiny.build(layout)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    units = find_units(model, head=False)
    names = [[spec.parameter.removeprefix(unit.prefix) for spec in unit.matrices] for unit in units]
    with torch.no_grad():
        found = dict(flow_gradients(Trunk(model, units, ONE, Resident(model)), names))
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert not any(one.requires_grad and one.grad is not None for one in model.parameters())
    return {
        f"{index}.{name}": units[index].module.get_parameter(name).detach().double().abs() * one.mean_OI
        for index, layer in found.items()
        for name, one in layer.items()
    }


def half(product: torch.Tensor) -> torch.Tensor:
    """Two positive factors as the square root of their product times a constant: the value stays, gradients halve."""
    return product.sqrt() * product.sqrt().detach()


def test_the_flow_is_that_of_a_llama_by_hand() -> None:
    model = tiny.build("llama")
    weights = {name: one.detach().double().abs().requires_grad_() for name, one in model.named_parameters()}
    x = torch.ones(32, dtype=torch.float64)
    for layer in range(3):

        def w(name: str, layer: int = layer) -> torch.Tensor:
            return weights[f"model.layers.{layer}.{name}.weight"]

        unit = x / x.square().mean().sqrt().detach()
        q, k, v = (w(f"self_attn.{one}_proj") @ unit for one in "qkv")
        # two query heads of width 8 to a key and value; one token attends to itself alone
        k, v = (one.view(2, 1, 8).expand(2, 2, 8).reshape(4, 8) for one in (k, v))
        score = half(q.view(4, 8) * k).sum(1, keepdim=True)
        x = x + w("self_attn.o_proj") @ half(score / score.detach() * v).flatten()
        unit = x / x.square().mean().sqrt().detach()
        x = x + w("mlp.down_proj") @ half((w("mlp.gate_proj") @ unit) * (w("mlp.up_proj") @ unit))
    x.sum().backward()  # type: ignore[no-untyped-call]
    found = flows("llama")
    assert len(found) == 21
    for name, one in found.items():
        parameter = weights[f"model.layers.{name}"]
        assert parameter.grad is not None
        expected = parameter.detach() * parameter.grad
        assert float((one - expected).abs().max()) <= TOLERANCE * float(expected.max()), name


@pytest.mark.parametrize("layout", FLOWING)
def test_no_layer_loses_flow(layout: str) -> None:
    """A layer that did would be refused; the flow of no matrix is empty, or it would be pruned whole."""
    assert all(float(one.sum()) > 0 and bool((one >= 0).all()) for one in flows(layout).values())


def test_factors_of_a_product_share_its_flow() -> None:
    total = {name: float(one.sum()) for name, one in flows("llama").items()}
    for layer in range(3):
        o, q, k, v = (total[f"{layer}.self_attn.{one}_proj.weight"] for one in "oqkv")
        down, gate, up = (total[f"{layer}.mlp.{one}_proj.weight"] for one in ("down", "gate", "up"))
        assert [q / o, k / o, v / o] == pytest.approx([0.25, 0.25, 0.5], rel=TOLERANCE)
        assert [gate / down, up / down] == pytest.approx([0.5, 0.5], rel=TOLERANCE)


def test_what_cannot_be_followed_is_refused() -> None:
    with pytest.raises(RunError, match=r"synflow cannot follow the flow through backbone\.layers\.2"):
        flows("mamba")
    with pytest.raises(UserError, match="a router sends that to few of the experts"):
        llmprune.prune(tiny.build("mixtral"), method="synflow", sparsity=0.5)


def test_synflow_needs_no_text_and_is_exact(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    report = llmprune.prune(model, method="synflow", sparsity=0.6, out=tmp_path / "out").report
    assert report["calibration"] is None
    sizes = [row["shape"][0] * row["shape"][1] for row in report["tensors"]]
    assert report["totals"]["zeros"] == round(0.6 * sum(sizes))
    assert len({round(row["achieved"] / size, 2) for row, size in zip(report["tensors"], sizes, strict=True)}) > 1
    resident = llmprune.prune(tiny.build("llama"), method="synflow", sparsity=0.6).report
    assert [row["achieved"] for row in resident["tensors"]] == [row["achieved"] for row in report["tensors"]]


def test_no_text_is_not_taken_for_unseen_experts(tmp_path: Path) -> None:
    model = tiny.save("gpt2", tmp_path / "model")
    report = llmprune.prune(model, method="synflow", sparsity=0.5, out=tmp_path / "out").report
    assert all(row["tokens"] is None and "fallback" not in row["notes"] for row in report["tensors"])
    assert not report["warnings"]
