"""What the engine refuses or tells apart: numbers that are none, operands, changes in place, settings of a model."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from engine_runs import SCHEDULES, assert_no_hooks, prune
from torch import nn
from transformers import PreTrainedModel

from llmprune.engine.collect import Collector
from llmprune.engine.observe import Observe
from llmprune.statistics import GRAM
from llmprune.types import RunError


@pytest.mark.parametrize("how", SCHEDULES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_activations_name_layer_matrix_and_batch(how: str, bad: float) -> None:
    model = tiny.build("llama")
    model.model.layers[1].post_attention_layernorm.weight.data[3] = bad
    with pytest.raises(RunError, match=r"model\.layers\.1\.mlp\.(gate|up)_proj\.weight .*for 24 of 24 .*batch 0"):
        prune(model, how)
    assert_no_hooks(model)


@pytest.mark.parametrize("how", SCHEDULES)
def test_non_finite_activations_name_the_batch_that_holds_them(how: str) -> None:
    model = tiny.build("opt")
    model.model.decoder.embed_tokens.weight.data[65] = float("nan")
    with pytest.raises(RunError, match=r"layers\.0\.self_attn\.[qkv]_proj\.weight .*for 1 of 24 tokens .*batch 1"):
        prune(model, how)


@pytest.mark.parametrize("how", SCHEDULES)
@pytest.mark.parametrize("short", ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
def test_non_finite_weights_are_named(short: str, how: str) -> None:
    model = tiny.build("llama")
    model.get_submodule(f"model.layers.1.{short}").weight.data[2, 3] = float("nan")
    with pytest.raises(RunError, match=rf"model\.layers\.1\.{short}\.weight holds NaN"):
        prune(model, how)


@pytest.mark.parametrize("how", SCHEDULES)
@pytest.mark.parametrize("name", tiny.FUSED)
def test_non_finite_weights_of_an_expert_are_named(name: str, how: str) -> None:
    model = tiny.build(name)
    path, parameter = next(one for one in model.named_parameters() if one[0].endswith("experts.gate_up_proj"))
    parameter.data[1, 2, 3] = float("inf")
    with pytest.raises(RunError, match=rf"{path}.* holds NaN or infinity"):
        prune(model, how)


# --- operators and tensors that no layout above has ---


def test_experts_are_told_apart_in_either_order_of_operands() -> None:
    a_EIO, b_EOI = nn.Parameter(torch.randn(3, 4, 6)), nn.Parameter(torch.randn(3, 6, 4))
    seen = []
    x_TI = torch.randn(5, 4)
    with Observe({"a": a_EIO, "b": b_EOI}, lambda products: seen.extend((p.name, p.transposed) for p in products)):
        x_TI @ a_EIO[1]
        b_EOI[2] @ x_TI.T
        torch.nn.functional.linear(x_TI, b_EOI[0])
        torch.addmm(torch.zeros(6), x_TI, a_EIO[2])
        torch.bmm(x_TI.expand(3, 5, 4), a_EIO)
        torch.bmm(b_EOI, x_TI.T.expand(3, 4, 5))
        x_TI @ x_TI.T
    batched = [("a[0]", True), ("a[1]", True), ("a[2]", True), ("b[0]", False), ("b[1]", False), ("b[2]", False)]
    assert seen == [("a[1]", True), ("b[2]", False), ("b[0]", False), ("a[2]", True), *batched]


def test_parameters_cut_out_of_one_tensor_are_told_apart() -> None:
    q_OI, k_OI = (nn.Parameter(one) for one in torch.randn(12, 4).chunk(2))
    gate_EOI, up_EOI = (nn.Parameter(one) for one in torch.randn(3, 12, 4).chunk(2, dim=1))
    parameters = {"q": q_OI, "k": k_OI, "gate": gate_EOI, "up": up_EOI}
    seen = []
    x_TI = torch.randn(5, 4)
    with Observe(parameters, lambda products: seen.extend(product.name for product in products)):
        for weight_OI in (k_OI, q_OI, gate_EOI[1], up_EOI[1], up_EOI[2]):
            torch.nn.functional.linear(x_TI, weight_OI)
        torch.bmm(x_TI.expand(2, 5, 4), up_EOI[1:].mT)
        torch.nn.functional.linear(x_TI, q_OI[1:])
    assert seen == ["k", "q", "gate[1]", "up[1]", "up[2]", "up[1]", "up[2]"]


class Careless(nn.Module):
    """A layer that changes a tensor in place after it has been multiplied."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.what = what

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.what == "its own input":
            return x.add_(self.second(self.first(x * 2)))
        hidden = x * 2
        y = self.first(hidden)
        hidden.add_(1)
        return self.second(hidden) + y


@pytest.mark.parametrize("what", ["its own input", "the input of first"])
def test_changes_in_place_are_noticed(what: str) -> None:
    layer = Careless(what)
    collector = Collector({"first": layer.first.weight, "second": layer.second.weight}, frozenset({GRAM}))
    with torch.no_grad(), pytest.raises(RunError, match=rf"{what} .*in place.*--schedule module"):
        collector.run(layer, [((torch.randn(3, 8),), {}), ((torch.randn(3, 8),), {})])


# --- the caller's model ---


def settings_of(model: PreTrainedModel) -> list[Any]:
    modes = [(path, module.training) for path, module in model.named_modules()]
    implementations = [module.config._experts_implementation for module in model.modules() if hasattr(module, "config")]
    return [modes, implementations, [parameter.requires_grad for parameter in model.parameters()]]


@pytest.mark.parametrize("how", SCHEDULES)
@pytest.mark.parametrize("mode", ["training", "evaluation", "mixed"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_gets_its_settings_back(how: str, mode: str, fails: bool) -> None:
    model = tiny.build("mixtral").train(mode != "evaluation")
    model.model.layers[1].train(mode == "training")
    assert model.config._experts_implementation != "eager"
    before = settings_of(model)
    if fails:
        model.model.layers[1].post_attention_layernorm.weight.data[3] = float("nan")
        with pytest.raises(RunError):
            prune(model, how)
    else:
        prune(model, how)
    assert settings_of(model) == before
    assert_no_hooks(model)
