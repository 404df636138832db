"""`bench` counts what is there, times in turns, and says what it did. Times themselves are not judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from runner import cli
from safetensors.torch import load_file, save_file

import llmprune
from llmprune import UserError
from llmprune.eval import speed

DEMO = Path(llmprune.__file__).parent / "demo" / "model"


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A tiny Llama with one matrix set to zero."""
    tiny.save("llama", tmp_path / "half")
    path = tmp_path / "half" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"].zero_()
    save_file(tensors, path, metadata={"format": "pt"})
    return tmp_path / "half"


def test_counts(half: Path) -> None:
    found = speed.bench({"dense": tiny.save("llama", half.parent / "dense"), "pruned": half}, prompt=4, new=3, rounds=2)
    dense, pruned = found["models"]["dense"], found["models"]["pruned"]
    model = tiny.build("llama")
    assert pruned["params"] == dense["params"] == sum(one.numel() for one in model.parameters())
    assert (dense["zeros"], pruned["zeros"]) == (0, 48 * 32)
    assert dense["weight_bytes"] == 4 * dense["params"]
    assert dense["file_bytes"] == (half.parent / "dense" / "model.safetensors").stat().st_size
    # 2 operations a weight and token in the products, head included, and the attention's own two products
    products = sum(one.numel() for name, one in model.named_parameters() if one.dim() == 2 and "embed" not in name)
    attention = 3 * 2 * (2 * 4 * 4 * 32)
    # some releases compute the rotary angles, 4 positions x 4 frequencies, as a matrix product
    rotary = 2 * 4 * 4
    possible = {2 * 4 * products + one + other for one in (0, attention) for other in (0, rotary)}
    assert dense["prefill_flops"] in possible
    for row in (dense, pruned):
        for what in ("prefill", "decode"):
            assert row[what]["q1_s"] <= row[what]["median_s"] <= row[what]["q3_s"]
        assert row["load_s"] > 0 and row["memory"]["beyond_weights_bytes"] >= 0
    assert found["protocol"]["rounds"] == 2 and found["protocol"]["prompt"] == 4


def test_packed_models_count_as_the_dense_ones_they_stand_for(tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "source")
    llmprune.prune(source, out=tmp_path / "out", method="magnitude", pattern="2:4")
    models = {"dense": tmp_path / "out", "packed": tmp_path / "out"}
    found = speed.bench(models, prompt=4, new=3, rounds=2, sparse=True)["models"]
    for key in ("params", "zeros", "prefill_flops", "file_bytes"):
        assert found["packed"][key] == found["dense"][key]
    assert "matmul24" not in found["dense"]["kernels"] and found["packed"]["kernels"]["matmul24"]["ran"] == ["torch"]
    pruned = 2 * found["dense"]["zeros"]
    # in float32 a packed matrix takes half of the dense bytes, and two bits for every kept weight
    assert found["packed"]["weight_bytes"] == found["dense"]["weight_bytes"] - 4 * pruned * (1 - 0.5 - 1 / 32)
    printed = cli("bench", tmp_path / "out", "--sparse", "--prompt", 4, "--new", 3, "--rounds", 2)
    assert "products with 2:4 matrices" in printed.out


def test_takes_turns_and_decodes_what_was_asked(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    generate = speed._generate
    lengths: list[int] = []

    def spied(model: Any, ids: torch.Tensor, new: int) -> None:
        calls.append((id(model), new))
        written = model.generate(input_ids=ids, min_new_tokens=new, max_new_tokens=new, do_sample=False, pad_token_id=0)
        lengths.append(written.shape[1] - ids.shape[1])
        generate(model, ids, new)

    monkeypatch.setattr(speed, "_generate", spied)
    speed.bench({"a": half, "b": half}, prompt=4, new=3, rounds=2)
    a, b = calls[0][0], calls[1][0]
    assert a != b
    assert calls == [(a, 3), (b, 3), *[(a, 1), (a, 3), (b, 1), (b, 3)] * 2]
    assert lengths == [new for _, new in calls]


def test_command(half: Path) -> None:
    ran = cli("bench", half, "--prompt", 4, "--new", 2, "--rounds", 2, "--json", "--out", half / "bench.json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out) == json.loads((half / "bench.json").read_text())
    shown = cli("bench", half, "--baseline", DEMO, "--prompt", 4, "--new", 2, "--rounds", 2)
    assert "medians (quartiles) of 2 rounds in turns; prompt 4, 2 new, batch 1" in shown.out


def test_refusals(half: Path) -> None:
    with pytest.raises(UserError, match="rounds 1 must be at least 2"):
        speed.bench({"a": half}, rounds=1)
    with pytest.raises(UserError, match="prompt 64 \\+ new 8 is more than the 64 tokens"):
        speed.bench({"a": half}, prompt=64, new=8)
    assert cli("bench", half, "--out", half).code == 2
