"""Layers left out: the checkpoint is the model that skips them, and every method decides by its own formula."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import runner
import tiny
import torch
from depth_models import TEXT, load, logits, skip

import llmprune
from llmprune.arch.discover import decoder_layers
from llmprune.types import UserError

# Layer 0 is the odd one where kinds differ: dense before sparse, sliding before full attention.
SKIPPED = {
    "llama": [1],
    "qwen3": [0, 2],
    "gemma3": [0],
    "opt": [1],
    "gpt2": [0, 1],
    "gpt-neox": [2],
    "phi3": [1],
    "mixtral": [1],
    "qwen3-moe": [0],
    "deepseek-v3": [0],
    "gpt-oss": [0],
    "bloom": [1],
    "llama4": [0],
    "mamba": [1],
    "qwen3-next": [0],
}


# The checkpoint.


@pytest.mark.parametrize("name", SKIPPED)
def test_dropping_is_skipping(name: str, tmp_path: Path) -> None:
    source = tiny.save(name, tmp_path / "dense")
    dropped = SKIPPED[name]
    report = llmprune.prune(source, out=tmp_path / "out", drop_layers=dropped).report
    small, ids = load(tmp_path / "out"), tiny.tokens(2, 12)
    expected = logits(skip(tiny.build(name), dropped), ids)
    assert float((logits(small, ids) - expected).abs().max()) <= 1e-6
    assert report["structure"]["dropped"]["layers"] == dropped
    assert report["totals"]["params_after"] == sum(one.numel() for one in small.parameters())
    written = [
        small.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*written)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "deepseek-v3", "llama4"])
def test_a_loaded_model_is_cut_where_it_lies(name: str, tmp_path: Path) -> None:
    model, ids = tiny.build(name), tiny.tokens(2, 12)
    expected = logits(skip(tiny.build(name), SKIPPED[name]), ids)
    result = llmprune.prune(model, out=tmp_path / "out", drop_layers=SKIPPED[name])
    assert result.model is model
    for cut in (model, load(tmp_path / "out")):
        assert float((logits(cut, ids) - expected).abs().max()) <= 1e-6
        assert len(decoder_layers(cut)[1]) == cut.config.num_hidden_layers == 3 - len(SKIPPED[name])
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-6)  # with the cache
    assert all(one.requires_grad for one in model.parameters())


def test_kept_layers_keep_their_bytes_and_tensors_beside_the_model_stay(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = tiny.save("llama", tmp_path / "dense")
    stored = load_file(source / "model.safetensors")
    stored["model.layers.2.self_attn.rotary_emb.inv_freq"] = torch.arange(4.0)
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(3.0)
    stored["mtp.weight"] = torch.ones(2)
    save_file(
        {key: one.to(torch.bfloat16) for key, one in stored.items()}, source / "model.safetensors", {"format": "pt"}
    )
    llmprune.prune(source, out=tmp_path / "out", drop_layers=[0])
    found = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(source / "model.safetensors")
    for key, one in found.items():
        parts = key.split(".")
        if parts[:2] == ["model", "layers"]:
            parts[2] = str(int(parts[2]) + 1)
        assert torch.equal(one, before[".".join(parts)]) and one.dtype == torch.bfloat16
    gone = {key for key in before if key.startswith("model.layers.0.")}
    assert len(found) == len(before) - len(gone)
    assert "model.layers.1.self_attn.rotary_emb.inv_freq" in found and "mtp.weight" in found


def test_sharded_checkpoints_and_equal_bytes(tmp_path: Path) -> None:
    source = tiny.save("mixtral", tmp_path / "dense", shards=True)
    for out in ("a", "b"):
        llmprune.prune(source, out=tmp_path / out, method="shortgpt", drop_layers=1, calibration=TEXT)
    assert runner.product(tmp_path / "a") == runner.product(tmp_path / "b")
    report = json.loads((tmp_path / "a" / "llmprune.json").read_text())
    rows, totals = report["structure"]["scores"], report["totals"]
    assert [row["dropped"] for row in rows].count(True) == 1 and len(rows) == 3
    assert sum(row["saved"] for row in rows) == totals["params_before"] - totals["params_after"]
    assert math.isclose(report["structure"]["figures"]["similarity"][1][1], 1, abs_tol=1e-5)


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmprune.checkpoint.output import Output

    source = tiny.save("qwen3-moe", tmp_path / "dense")
    settings: dict[str, Any] = {"method": "hc-smoe", "drop_experts": 0.25, "calibration": TEXT}
    llmprune.prune(source, out=tmp_path / "whole", **settings)
    write, written = Output.write, []

    def stop_at_the_third(self: Output, unit: str, *rest: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(unit)
        write(self, unit, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Output, "write", stop_at_the_third)
        llmprune.prune(source, out=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="--resume"):
        llmprune.prune(source, out=tmp_path / "out", **settings)
    llmprune.prune(source, out=tmp_path / "out", resume=True, **settings)
    assert runner.product(tmp_path / "out") == runner.product(tmp_path / "whole")


# Wrong input.


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"drop_layers": 0}, "1 to 2 can go"),
        ({"drop_layers": 3}, "1 to 2 can go"),
        ({"drop_layers": [5]}, "layers are 0 to 2"),
        ({"drop_layers": [0, 1, 2]}, "at least one must stay"),
        ({"drop_layers": [1], "method": "shortgpt"}, "chooses the layers itself"),
        ({"drop_layers": 1, "sparsity": 0.5}, "sparsity has no meaning"),
        ({"drop_layers": 1, "targets": "q_proj"}, "targets has no meaning"),
        ({"method": "shortgpt"}, "say how much"),
        ({"drop_layers": 1, "method": "sparsegpt"}, "no amount for 'sparsegpt'"),
        ({"drop_layers": 1, "method": "reap"}, "say how much"),
        ({"drop_experts": 0.5}, "no experts"),
        ({"drop_experts": 1.5}, "between 0 and 1"),
        ({"drop_layers": 2, "method": "sleb"}, "protect fewer"),
        ({"drop_layers": [0], "method": "replaceme"}, "layer 0"),
        ({"drop_layers": [0, 2], "method": "replaceme"}, "follow each other"),
        ({"drop_layers": "1,x"}, "drop_layers"),
    ],
)
def test_wrong_input_writes_nothing(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "dense")
    with pytest.raises(UserError, match=says):
        llmprune.prune(source, out=tmp_path / "out", calibration=TEXT, **settings)
    assert [one.name for one in tmp_path.iterdir()] == ["dense"]


def test_command_line(tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "dense")
    ran = runner.cli("prune", source, "--out", tmp_path / "out", "--drop-layers", "0,2", "--json", "--quiet")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["structure"]["dropped"]["kept_layers"] == [1]
    again = runner.cli("prune", source, "--out", tmp_path / "out", "--drop-layers", "0,2", "--resume")
    assert (again.code == 0 and "33" in again.out) or "parameters stay" in again.out, again.err
    assert runner.cli("prune", source, "--out", tmp_path / "x", "--drop-layers", "7,").code == 2
    plan = runner.cli("prune", source, "--drop-layers", "1", "--method", "keep-first", "--dry-run")
    assert plan.code == 0 and "depth method on 3 layers" in plan.out
