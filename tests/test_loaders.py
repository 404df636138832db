"""What vLLM, TGI and converters expect of a folder: they go by config.json and tensor names, not by transformers' classes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import safe_open
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import llmprune
from llmprune.checkpoint import output

TEXT = [row.tolist() for row in tiny.tokens(4, 20, seed=3)]
EDITS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"method": "sparsegpt", "pattern": "2:4"}),
    ("llama", {"drop_layers": [1]}),
    ("qwen3", {"method": "wanda", "sparsity": 0.5}),
    ("gemma3", {"drop_layers": [0]}),
    ("mixtral", {"method": "wanda", "sparsity": 0.5}),
    ("mixtral", {"method": "reap", "drop_experts": 0.5}),
    ("gpt2", {"method": "magnitude", "sparsity": 0.5}),
]


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every safetensors file of a folder, as loaders find them: by a glob."""
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata()["format"] == "pt"
            for name in file.keys():  # noqa: SIM118 (not iterable)
                assert name not in found, f"{name} lies in two files"
                found[name] = file.get_tensor(name)
    return found


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize(("layout", "edit"), EDITS, ids=lambda one: one if isinstance(one, str) else str(one))
def test_a_folder_is_what_loaders_expect(
    layout: str, edit: dict[str, Any], sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sharded:
        monkeypatch.setattr(output, "JOIN_BYTES", 0)
    dense = tiny.save(layout, tmp_path / "dense")
    llmprune.prune(dense, out=tmp_path / "out", calibration=TEXT, **edit)
    before, after = config_of(dense), config_of(tmp_path / "out")
    assert after["architectures"] == before["architectures"] and after["model_type"] == before["model_type"]
    # a key such as quantization_config or sparsity_config makes vLLM refuse the model
    assert set(after) <= set(before)
    dense_tensors, tensors = tensors_of(dense), tensors_of(tmp_path / "out")
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.exists() is sharded
    if sharded:
        weight_map = json.loads(index.read_text())["weight_map"]
        assert set(weight_map) == set(tensors)
        assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == set(weight_map.values())
    assert {one.dtype for one in tensors.values()} == {one.dtype for one in dense_tensors.values()}
    # layers and experts are numbered from 0 without gaps, as many as the config says
    layers = {int(found[1]) for name in tensors if (found := re.search(r"\.(?:layers|h)\.(\d+)\.", name))}
    assert layers == set(range(after.get("num_hidden_layers", after.get("n_layer"))))
    experts = {int(found[1]) for name in tensors if (found := re.search(r"\.experts\.(\d+)\.", name))}
    if experts:
        assert experts == set(range(after["num_local_experts"]))
    for name, tensor in tensors.items():
        # the names of the dense model, and but for the router's rows its shapes
        assert name in dense_tensors
        assert tensor.shape[1:] == dense_tensors[name].shape[1:]
        assert len(tensor) in (len(dense_tensors[name]), after.get("num_local_experts"))


def by_names(folder: Path, ids_T: torch.Tensor) -> torch.Tensor:
    """A Llama written out in float64 that knows nothing but config.json and the names of the tensors."""
    config, tensors = config_of(folder), {name: one.double() for name, one in tensors_of(folder).items()}
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    inverse = theta ** (-torch.arange(0, size, 2).double() / size)
    angles = torch.outer(torch.arange(len(ids_T)).double(), inverse).repeat(1, 2)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * tensors[f"{name}.weight"]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-right, left], -1) * angles.sin()

    x = tensors["model.embed_tokens.weight"][ids_T]
    hidden = torch.ones(len(ids_T), len(ids_T)).triu(1).bool()
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        y = norm(x, f"{at}.input_layernorm")
        q, k, v = (
            (y @ tensors[f"{at}.self_attn.{one}_proj.weight"].T).unflatten(-1, (-1, size)).transpose(0, 1)
            for one in "qkv"
        )
        k, v = (one.repeat_interleave(heads // groups, 0) for one in (k, v))
        scores = (rotate(q) @ rotate(k).mT / size**0.5).masked_fill(hidden, float("-inf"))
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + mixed @ tensors[f"{at}.self_attn.o_proj.weight"].T
        y = norm(x, f"{at}.post_attention_layernorm")
        gate, up, down = (tensors[f"{at}.mlp.{one}_proj.weight"] for one in ("gate", "up", "down"))
        x = x + (F.silu(y @ gate.T) * (y @ up.T)) @ down.T
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    return norm(x, "model.norm") @ head.T


@pytest.mark.parametrize("edit", [one for layout, one in EDITS if layout == "llama"], ids=str)
def test_a_reader_that_goes_by_names_gets_the_same_logits(edit: dict[str, Any], tmp_path: Path) -> None:
    llmprune.prune(tiny.save("llama", tmp_path / "dense"), out=tmp_path / "out", calibration=TEXT, **edit)
    ids_T = tiny.tokens(1, 12)[0]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    with torch.no_grad():
        expected = theirs(input_ids=ids_T[None]).logits[0]
    # transformers makes its rotary angles in float32: 2^-24 of angles up to 12, through a few layers
    assert torch.allclose(by_names(tmp_path / "out", ids_T), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
