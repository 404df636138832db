"""SliceGPT: the residual stream in other bases is the same model, and with fewer dimensions the projected one."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, OPTConfig, PreTrainedModel

import llmprune
from llmprune.methods.width.slicegpt import SliceGPT
from llmprune.types import UserError

TEXT = [row.tolist() for row in tiny.tokens(6, 20, seed=3)]
OPT = OPTConfig(**tiny.SIZES, **tiny.SPECIAL, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64)
# Norms and products in float32, three layers: a few times its rounding of numbers of size 5.
ROUNDING = 1e-5


@pytest.fixture(autouse=True)
def plain_opt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny.TINY, "opt", OPT)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def sliced(name: str, folder: Path, width: int, layout: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("llmprune.rotation_plan._widest", lambda plan, _: replace(plan, width=width))
    source = tiny.save(name, folder / "dense")
    out = folder / "out"
    return llmprune.prune(source, out=out, method="slicegpt", ratio=0.2, calibration=TEXT, layout=layout)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *[(name, "plain") for name in ("llama", "qwen3", "phi3", "mixtral", "qwen3-moe")],
        *[(name, "remote-code") for name in ("llama", "qwen3", "phi3", "opt", "gpt2")],
    ],
)
def test_at_zero_slicing_it_is_the_original(
    name: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, ids = sliced(name, tmp_path, 32, layout, monkeypatch), tiny.tokens(2, 12)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=layout != "plain").eval()
    assert float((logits(loaded, ids) - logits(tiny.build(name), ids)).abs().max()) <= ROUNDING
    assert result.report["layout"] == layout
    written = [
        loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*written)


@pytest.mark.parametrize(("name", "layout"), [("llama", "plain"), ("llama", "remote-code"), ("opt", "remote-code")])
def test_slicing_is_projecting_the_hidden_state(
    name: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is the old model in its old basis, its stream projected wherever a basis begins."""
    seen: list[Any] = []
    turn = SliceGPT.turn

    def remember(self: SliceGPT, *args: Any, **kwargs: Any) -> Any:
        seen.append(turn(self, *args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(SliceGPT, "turn", remember)
    result, ids = sliced(name, tmp_path, 24, layout, monkeypatch), tiny.tokens(2, 12)
    bases = [one.float() for one in seen[0].bases]
    for one in bases:
        assert torch.allclose(one.T @ one, torch.eye(one.shape[1]), atol=1e-5)
    model = tiny.build(name)
    decoder = model.model.decoder if name == "opt" else model.model
    norms = (
        ("self_attn_layer_norm", "final_layer_norm")
        if name == "opt"
        else ("input_layernorm", "post_attention_layernorm")
    )

    def projecting(basis: torch.Tensor) -> Any:
        def project(module: Any, args: Any) -> None:
            centred = args[0] - args[0].mean(-1, keepdim=True) if name == "opt" else args[0]
            args[0].copy_(centred @ basis @ basis.T)  # what goes past the norm is the same tensor

        return project

    for index, layer in enumerate(decoder.layers):
        for number, norm in enumerate(norms):
            layer.get_submodule(norm).register_forward_pre_hook(projecting(bases[2 * index + number]))
    last = decoder.final_layer_norm if name == "opt" else decoder.norm
    last.register_forward_pre_hook(projecting(bases[-1]))
    assert float((logits(result.model, ids) - logits(model, ids)).abs().max()) <= ROUNDING


@pytest.mark.parametrize("width", [32, 24])
def test_a_tied_head_stays_tied(width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is the old model, all of its hidden states projected, and once more what its head reads."""
    tied = copy.deepcopy(tiny.TINY["llama"])
    tied.tie_word_embeddings = True
    monkeypatch.setitem(tiny.TINY, "tied", tied)
    model, ids = tiny.build("tied"), tiny.tokens(2, 12)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if "norm" in name:  # gains apart, so that they tell dimensions apart
                one.copy_(torch.linspace(0.5, 1.5, len(one)))
    source = tmp_path / "dense"
    model.save_pretrained(source)
    monkeypatch.setattr("llmprune.rotation_plan._widest", lambda plan, _: replace(plan, width=width))
    settings: dict[str, Any] = {"method": "slicegpt", "ratio": 0.2, "calibration": TEXT}
    result = llmprune.prune(source, out=tmp_path / "out", **settings)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert result.report["totals"]["params_after"] == sum(one.numel() for one in loaded.parameters())
    memory = llmprune.prune(copy.deepcopy(model), **settings).model
    assert memory.lm_head.weight is memory.model.embed_tokens.weight
    # the rows of the new embeddings are the old ones in the basis, which they so betray
    old, new = (one.get_input_embeddings().weight.detach().double() for one in (model, loaded))
    basis = torch.linalg.lstsq(old, new).solution
    assert torch.allclose(basis.T @ basis, torch.eye(width, dtype=torch.float64), atol=1e-4)
    onto = (basis @ basis.T).float()

    def project(_: Any, args: Any) -> None:
        args[0].copy_(args[0] @ onto)  # what goes past a norm of a layer is the same tensor

    modules = [model.model.norm, model.lm_head]
    modules += [norm for one in model.model.layers for norm in (one.input_layernorm, one.post_attention_layernorm)]
    for one in modules:
        one.register_forward_pre_hook(project)
    expected = logits(model, ids)
    for one in (loaded, memory):
        assert float((logits(one, ids) - expected).abs().max()) <= 3 * ROUNDING


@pytest.mark.parametrize("layout", ["plain", "remote-code"])
def test_amounts_are_reached_and_a_loaded_model_gives_the_same(layout: str, tmp_path: Path) -> None:
    source, ids = tiny.save("qwen3", tmp_path / "dense"), tiny.tokens(2, 12)
    settings: dict[str, Any] = {"method": "slicegpt", "calibration": TEXT, "layout": layout}
    result = llmprune.prune(source, out=tmp_path / "ratio", ratio=0.3, **settings)
    layers = [
        sum(one.numel() for one in model.model.layers.parameters()) for model in (tiny.build("qwen3"), result.model)
    ]
    assert layers[1] <= 0.7 * layers[0]
    totals = llmprune.prune(source, out=tmp_path / "count", params=34000, **settings).report["totals"]
    small = llmprune.load(tmp_path / "count")
    assert totals["params_after"] == sum(one.numel() for one in small.parameters()) <= 34000
    memory = llmprune.prune(tiny.build("qwen3"), out=tmp_path / "memory", ratio=0.3, **settings)
    for one in (memory.model, llmprune.load(tmp_path / "memory")):
        assert float((logits(one, ids) - logits(result.model, ids)).abs().max()) <= ROUNDING


def test_streams_that_cannot_be_turned_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    amount: dict[str, Any] = {"method": "slicegpt", "ratio": 0.2, "calibration": TEXT}
    narrow = copy.deepcopy(OPT)
    narrow.word_embed_proj_dim = 24
    monkeypatch.setitem(tiny.TINY, "narrow", narrow)
    for name, layout, message in (
        ("gpt2", "plain", "layout=remote-code"),
        ("gemma3", "plain", "have 4 norms"),
        ("gpt-neox", "remote-code", "knows no other layers"),  # attention and MLP side by side
        ("narrow", "remote-code", "matrix of their own"),
    ):
        source = tiny.save(name, tmp_path / name)
        with pytest.raises(UserError, match=message):
            llmprune.prune(source, out=tmp_path / "out", layout=layout, **amount)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_are_turned_in_one_basis_alone(name: str) -> None:
    with pytest.raises(UserError, match="leave the layout plain"):
        llmprune.prune(tiny.build(name), method="slicegpt", ratio=0.2, calibration=TEXT, layout="remote-code")
