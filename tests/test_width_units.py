"""Units of width: what is cut out of the parameters is what zeros in them would silence, in every layout."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from families import MORE, WIDE
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from llmprune.arch.roles import Roles, layout_of, layouts
from llmprune.arch.units import CHANNEL, EXPERT_CHANNEL, KV_GROUP, QUERY_HEAD, RESIDUAL, Units, find_units
from llmprune.checkpoint.narrow import Room, check_shapes, narrow_config
from llmprune.checkpoint.skeleton import build_skeleton, run_experts_one_by_one
from llmprune.checkpoint.slicing import Slicing
from llmprune.types import UserError

SHARED = ("qwen3", "gemma3", "opt", "gpt2", "gpt-neox", "phi3", "falcon", "bloom", "mixtral", "qwen3-moe")
FAMILIES = [*MORE, *SHARED]
# Where no plain class holds fewer: what goes is filled with zeros.
OLD = ("stablelm", "gpt-neox", "gpt2", "opt", "bloom", "mpt", "gptj", "olmoe", "helium")
FIXED = {
    KV_GROUP: (*OLD, "falcon-mha", "falcon-new", "falcon"),
    QUERY_HEAD: (*OLD, "falcon-mha", "falcon-new", "falcon"),
    CHANNEL: ("bloom", "mpt"),
    RESIDUAL: ("olmoe",),
}
KINDS = (KV_GROUP, QUERY_HEAD, CHANNEL, EXPERT_CHANNEL, RESIDUAL)


def config_of(name: str) -> Any:
    return copy.deepcopy(MORE.get(name) or tiny.TINY[name])


def build(name: str, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    monkeypatch.setitem(tiny.TINY, name, config_of(name))
    return tiny.build(name)


def shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    return {name: one.shape for name, one in model.named_parameters()}


def some(units: Units, count: int) -> list[int]:
    """`count` units of every stratum, at random."""
    generator = torch.Generator().manual_seed(units.layer or 0)
    return [
        run * units.size + int(one)
        for run in range(units.strata)
        for one in torch.randperm(units.size, generator=generator)[:count]
    ]


def cutting(model: PreTrainedModel, kind: str) -> Slicing:
    """About a third of the units gone; kept as zeros where no plain class holds fewer."""
    units = find_units(Roles(model), [kind])
    room = Room.of(model, model.config, Roles(model), [kind])
    size = units[0].size if units else 1
    left = max(room.heads, key=lambda one: (one < size, one)) if room.heads else max(size - max(size // 3, 1), 1)
    removed = {(one.layer, kind): some(one, size - left) for one in units}
    return Slicing(units, shapes(model), removed, held=room.fixed)


@torch.no_grad()
def filled(model: PreTrainedModel, values: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A copy of a model with other values."""
    model = copy.deepcopy(model)
    for name, one in model.named_parameters():
        one.copy_(values[name])
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    with run_experts_one_by_one(model.double()):
        found: torch.Tensor = model(input_ids=tiny.tokens(2, 12), use_cache=False).logits
    return found


def physical(model: PreTrainedModel, slicing: Slicing) -> PreTrainedModel:
    """The model that the new configuration builds, filled with what is left of the parameters."""
    small = AutoModelForCausalLM.from_config(narrow_config(model, model.config, slicing), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, one in model.named_buffers():  # as that of an activation: none belongs to a unit
            small.get_buffer(name).copy_(one)
        for name, one in small.named_parameters():
            one.copy_(slicing.cut(name, model.get_parameter(name).data))
    return small


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_zeros_are_removal(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name, monkeypatch)
    known = layout_of(model.config).narrow_hidden
    if kind == RESIDUAL and (known is None or model.config.model_type not in known.types):
        pytest.skip("the hidden state of this layout cannot be narrowed")
    slicing = cutting(model, kind)
    if all(one.size == 1 for one in slicing.units.values()):
        pytest.skip("no such unit, or only one")
    small = physical(model, slicing)
    check_shapes(small, slicing)
    zeros = filled(model, {key: slicing.zeroed(key, one.data) for key, one in model.named_parameters()})
    # all in double precision but the norms and the softmax, which many classes compute in single
    assert float((logits(small) - logits(zeros)).abs().max()) <= 1e-5
    count = sum(one.numel() for one in model.parameters()) - slicing.parameters_removed
    assert sum(one.numel() for one in small.parameters()) == count
    assert (slicing.parameters_removed > 0) == (name not in FIXED.get(kind, ()))


@pytest.mark.parametrize("name", ["llama", "olmo2", "qwen3-moe"])
def test_zeros_are_removal_of_several_kinds_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name, monkeypatch)
    units = find_units(Roles(model), KINDS if name == "qwen3-moe" else (KV_GROUP, CHANNEL, RESIDUAL))
    units = [one for one in units if one.kind != QUERY_HEAD]
    # in one layer one unit more goes, so that zeros of one kind lie in what is left of the others
    gone = {(one.layer, one.kind): some(one, one.size // 2 if one.layer else one.size // 3) for one in units}
    slicing = Slicing(units, shapes(model), gone)
    small = physical(model, slicing)
    zeros = filled(model, {key: slicing.zeroed(key, one.data) for key, one in model.named_parameters()})
    assert float((logits(small) - logits(zeros)).abs().max()) <= 1e-5
    count = sum(one.numel() for one in model.parameters()) - slicing.parameters_removed
    assert sum(one.numel() for one in small.parameters()) == count
    # none of the random parameters is zero by itself
    assert sum(int((one == 0).sum()) for one in small.parameters()) == slicing.parameters_zeroed > 0


def test_parameters_of_the_published_model() -> None:
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    model = build_skeleton(config, torch.bfloat16)
    units = find_units(Roles(model), [KV_GROUP, CHANNEL])
    gone = {(one.layer, one.kind): range(one.count // 4) for one in units if 4 <= (one.layer or 0) < 30}
    slicing = Slicing(units, shapes(model), gone, ragged=True)
    assert {one.cost for one in units} == {5_242_880, 12_288}
    assert sum(one.numel() for one in model.parameters()) - slicing.parameters_removed == 6_612_586_496
    assert sum(one.numel() for one in slicing.shapes().values()) == 6_612_586_496


def test_layers_of_different_width_are_padded_with_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen2", monkeypatch)
    units = find_units(Roles(model), [KV_GROUP, CHANNEL])
    gone = {(0, KV_GROUP): [1], (1, KV_GROUP): [0, 3], (1, CHANNEL): [5], (2, KV_GROUP): [2], (2, CHANNEL): [1, 40]}
    slicing = Slicing(units, shapes(model), gone)
    assert slicing.spare[(1, KV_GROUP)] == (0,)
    assert slicing.width((2, CHANNEL)) == 48 and slicing.width((2, KV_GROUP)) == 3
    small = physical(model, slicing)
    zeros = filled(model, {key: slicing.zeroed(key, one.data) for key, one in model.named_parameters()})
    assert float((logits(small) - logits(zeros)).abs().max()) <= 1e-5
    removed = slicing.parameters_removed + slicing.parameters_zeroed
    assert removed == sum(one.cost * len(gone.get((one.layer or 0, one.kind), ())) for one in units)
    ragged = Slicing(units, shapes(model), gone, ragged=True)
    assert ragged.parameters_removed == removed


def test_a_head_count_that_the_class_refuses_is_hosted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", monkeypatch)
    units = find_units(Roles(model), [KV_GROUP])
    slicing = Slicing(units, shapes(model), {(one.layer, KV_GROUP): [1] for one in units})
    config = narrow_config(model, model.config, slicing)
    assert (config.model_type, config.num_attention_heads, config.sliding_window) == ("mistral", 6, None)
    assert config.architectures == ["MistralForCausalLM"]
    for key in ("attention_bias", "mlp_bias"):
        biased = LlamaConfig(**WIDE, **{key: True})
        with pytest.raises(UserError, match="6 heads"):
            narrow_config(AutoModelForCausalLM.from_config(biased), biased, slicing)


def test_uneven_groups_and_empty_layers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen2", monkeypatch)
    heads = find_units(Roles(model), [QUERY_HEAD])
    with pytest.raises(UserError, match="every group of them must lose as many"):
        Slicing(heads, shapes(model), {(0, QUERY_HEAD): [0, 1, 2]})
    with pytest.raises(UserError, match="one must stay"):
        Slicing(heads, shapes(model), {(0, QUERY_HEAD): range(8)})


def test_every_type_of_a_layout_is_known_to_transformers() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as known

    types = [name for layout in layouts() for name in layout.types]
    assert len(types) == len(set(types))
    assert set(types) <= set(known)


def test_unknown_types_are_refused() -> None:
    with pytest.raises(UserError, match="'deepseek_v3' model are heads and channels is not known"):
        Roles(tiny.build("deepseek-v3"))
