"""Whole runs in every layout: what is pruned, what is saved, and that a streamed run gives the bytes of one in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import llmprune
from llmprune.arch.discover import find_units
from llmprune.checkpoint.skeleton import build_skeleton, load_config
from llmprune.checkpoint.source import Checkpoint
from llmprune.types import RunError
from llmprune.weights import Streamed

LAYOUTS = list(tiny.TINY)
SCHEDULES = ["layer", "module"]
# Saved in several files; the others in one.
SHARDED = LAYOUTS[::2]
# Modules that score experts, by the last part of their names in these layouts.
ROUTERS = ("gate", "router", "shared_expert_gate")


class Runs:
    """The runs that several tests look at, each made when first asked for. Their results are not to be changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = cache(self._source)
        self.streamed = cache(self._streamed)
        self.resident = cache(self._resident)

    def _source(self, name: str) -> Path:
        return tiny.save(name, self.folder / name, shards=name in SHARDED)

    def _streamed(self, name: str, how: str, pattern: str = "") -> llmprune.Result:
        out = self.folder / f"{name}-{how}-{pattern}-streamed"
        return llmprune.prune(self.source(name), out=out, **settings(how, pattern))

    def _resident(self, name: str, how: str) -> llmprune.Result:
        return llmprune.prune(load(self.source(name)), out=self.folder / f"{name}-{how}-resident", **settings(how))


def settings(how: str, pattern: str = "") -> dict[str, Any]:
    amount = {"pattern": pattern} if pattern else {"sparsity": 0.5}
    return {"method": "sparsegpt", "calibration": tiny.tokens(), "batch_size": 2, "schedule": how, **amount}


def load(folder: Path | None) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    return model


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def stored(folder: Path | None) -> dict[str, torch.Tensor]:
    """Every tensor in the safetensors files of a folder."""
    assert folder is not None
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as handle:
            tensors.update({key: handle.get_tensor(key) for key in handle.keys()})  # noqa: SIM118
    return tensors


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8)
    )


def layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the decoder layers; `layers.N.` is part of every name."""
    names = ("model.layers.", "transformer.h.", "gpt_neox.layers.", "model.decoder.layers.", "backbone.layers.")
    return ((name, module) for name, module in model.named_modules() if name.startswith(names))


def products(model: PreTrainedModel) -> dict[str, tuple[torch.Tensor, int]]:
    """Every matrix that the layers multiply by, routers apart, with the axis that holds its inputs."""
    found = {}
    for name, module in layers(model):
        if isinstance(module, nn.Linear | Conv1D) and name.rpartition(".")[2] not in ROUTERS:
            found[f"{name}.weight"] = (module.weight.detach(), 0 if isinstance(module, Conv1D) else 1)
        if name.endswith(".experts"):
            axis = 0 if model.config.model_type in ("gpt_oss", "llama4_text") else 1
            for short in ("gate_up_proj", "down_proj"):
                for expert, weight in enumerate(getattr(module, short).detach()):
                    found[f"{name}.{short}[{expert}]"] = (weight, axis)
    return found


# --- what is pruned ---


def fused(*names: str) -> list[str]:
    return [f"{name}[{expert}]" for name in names for expert in range(tiny.EXPERTS)]


QKVO = [f"self_attn.{one}_proj.weight" for one in "qkvo"]
EXPERTS = fused("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
EXPECTED = {
    "llama": ("model.layers.1.", [*QKVO, *(f"mlp.{one}_proj.weight" for one in ("gate", "up", "down"))], []),
    "gpt2": (
        "transformer.h.1.",
        ["attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"],
        [],
    ),
    "phi3": (
        "model.layers.1.",
        ["self_attn.qkv_proj.weight", "self_attn.o_proj.weight", "mlp.gate_up_proj.weight", "mlp.down_proj.weight"],
        [],
    ),
    "mixtral": ("model.layers.1.", [*QKVO, *EXPERTS], ["mlp.gate.weight"]),
    "deepseek-v3": (
        "model.layers.1.",
        [
            *(
                f"self_attn.{one}.weight"
                for one in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
            ),
            *(f"mlp.shared_experts.{one}_proj.weight" for one in ("gate", "up", "down")),
            *EXPERTS,
        ],
        ["mlp.gate.weight"],
    ),
    "gpt-oss": (
        "model.layers.1.",
        [*QKVO, *EXPERTS],
        ["mlp.router.weight", "mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj_bias"],
    ),
    "llama4": (
        "model.layers.1.",
        [
            *QKVO,
            *(f"feed_forward.shared_expert.{one}_proj.weight" for one in ("gate", "up", "down")),
            *fused("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
        ],
        ["feed_forward.router.weight"],
    ),
    "mamba": (
        "backbone.layers.1.",
        [f"mixer.{one}_proj.weight" for one in ("in", "x", "dt", "out")],
        ["mixer.A_log", "mixer.conv1d.weight"],
    ),
    "qwen3-next": (
        "model.layers.0.",
        [
            *(f"linear_attn.{one}.weight" for one in ("in_proj_qkvz", "in_proj_ba", "out_proj")),
            *(f"mlp.shared_expert.{one}_proj.weight" for one in ("gate", "up", "down")),
            *EXPERTS,
        ],
        ["linear_attn.conv1d.weight", "mlp.gate.weight", "mlp.shared_expert_gate.weight"],
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_matrices_of_a_layer(name: str, runs: Runs) -> None:
    prefix, pruned, left = EXPECTED[name]
    report = runs.streamed(name, "layer").report
    assert {row["name"] for row in report["tensors"] if row["name"].startswith(prefix)} == {
        prefix + one for one in pruned
    }
    assert {one for one in report["left_alone"] if one.startswith(prefix)} == {prefix + one for one in left}


@pytest.mark.parametrize("how", SCHEDULES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_all_products_are_pruned_and_the_rest_is_listed(name: str, how: str, runs: Runs) -> None:
    result = runs.streamed(name, how)
    rows = {row["name"]: row for row in result.report["tensors"]}
    weights = products(result.model)
    assert rows.keys() == weights.keys()
    for key, (weight, axis) in weights.items():
        zeros = int((weight == 0).sum())
        assert rows[key]["planned"] == rows[key]["achieved"] == zeros == (weight.numel() + 1) // 2, key
        assert rows[key]["shape"] == [weight.shape[1 - axis], weight.shape[axis]], key
        assert rows[key]["tokens"] > 0 and 0 < rows[key]["error"] < 1, key
    left_alone = result.report["left_alone"]
    assert not left_alone.keys() & rows.keys() and all(left_alone.values())
    listed = left_alone.keys() | {key.partition("[")[0] for key in rows}
    owners = list(layers(result.model))
    matrices = {f"{owner}.{key}" for owner, m in owners for key, p in m.named_parameters(recurse=False) if p.dim() > 1}
    assert matrices and matrices == listed


@pytest.mark.parametrize("name", LAYOUTS)
def test_nothing_else_changes(name: str, runs: Runs) -> None:
    result = runs.streamed(name, "layer")
    pruned = {row["name"].partition("[")[0] for row in result.report["tensors"]}
    dense = load(runs.source(name)).state_dict()
    for key, tensor in result.model.state_dict().items():
        assert same_bytes(tensor, dense[key]) == (key not in pruned), key


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_of_four_lies_along_the_inputs(name: str, runs: Runs) -> None:
    result = runs.streamed(name, "layer", "2:4")
    weights = products(result.model)
    assert {row["name"] for row in result.report["tensors"]} == weights.keys()
    for key, (weight, axis) in weights.items():
        groups = (weight.T if axis == 0 else weight).unflatten(1, (-1, 4))
        assert bool(((groups == 0).sum(-1) == 2).all()), key
    # experts that lie one by one in the files are outputs x inputs there
    for key, tensor in stored(result.folder).items():
        if ".experts." in key and tensor.dim() == 2 and "bias" not in key:
            assert bool(((tensor.unflatten(1, (-1, 4)) == 0).sum(-1) == 2).all()), key


# --- what is saved ---


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_reloaded_model_gives_the_logits_of_the_one_in_memory(name: str, runs: Runs) -> None:
    in_memory, streamed = runs.resident(name, "layer"), runs.streamed(name, "layer")
    batch = {"input_ids": tiny.tokens(2, 20, seed=9), "use_cache": False}
    with torch.no_grad():
        expected = in_memory.model.eval()(**batch).logits
        dense = load(runs.source(name))(**batch).logits
        for folder in (in_memory.folder, streamed.folder):
            assert torch.equal(load(folder)(**batch).logits, expected)
    assert bool(expected.isfinite().all()) and not torch.allclose(expected, dense, atol=1e-2)
    assert in_memory.report["verified"] == "reloaded; logits equal those in memory"
    assert streamed.report["verified"].startswith("reloaded")


@pytest.mark.parametrize("how", SCHEDULES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_streamed_equals_in_memory_byte_for_byte(name: str, how: str, runs: Runs) -> None:
    in_memory, streamed = runs.resident(name, how), runs.streamed(name, how)
    state = streamed.model.state_dict()
    assert state.keys() == in_memory.model.state_dict().keys()
    assert all(same_bytes(tensor, state[key]) for key, tensor in in_memory.model.state_dict().items())
    ours, theirs, source = (stored(one) for one in (streamed.folder, in_memory.folder, runs.source(name)))
    assert ours.keys() == theirs.keys() == source.keys()
    assert all(same_bytes(tensor, ours[key]) for key, tensor in theirs.items())
    assert {key: (one.shape, one.dtype) for key, one in ours.items()} == {
        key: (one.shape, one.dtype) for key, one in source.items()
    }
    drop = ("time", "notes")
    rows = [
        [{k: v for k, v in row.items() if k not in drop} for row in one.report["tensors"]]
        for one in (in_memory, streamed)
    ]
    assert rows[0] == rows[1]


def test_some_sources_have_several_files(runs: Runs) -> None:
    assert all((len(list(runs.source(name).glob("*.safetensors"))) > 1) == (name in SHARDED) for name in LAYOUTS)


@pytest.mark.parametrize("how", SCHEDULES)
@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_the_input_folder_is_untouched(name: str, how: str, tmp_path: Path) -> None:
    source = tiny.save(name, tmp_path / "source", shards=True)
    before = digest(source)
    llmprune.prune(source, out=tmp_path / "out", **settings(how))
    assert digest(source) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_an_input_without_data_is_never_computed_with(runs: Runs) -> None:
    """Torch takes a tensor on the meta device beside weights with data, and answers with uninitialised memory."""
    source = runs.source("llama")
    model = build_skeleton(load_config(str(source)), torch.float32)
    weights = Streamed(
        model, Checkpoint(source), None, find_units(model, head=False), torch.float32, torch.device("cpu")
    )
    with weights.on_demand(), torch.no_grad():
        assert bool(model.model.embed_tokens(tiny.tokens()).isfinite().all())
        with pytest.raises(RunError, match=r"input of model\.embed_tokens .* pass the loaded model"):
            model.model.embed_tokens(tiny.tokens().to("meta"))


# --- tokens that count ---


@pytest.mark.parametrize("how", SCHEDULES)
@pytest.mark.parametrize("side", ["right", "left", "both"])
@pytest.mark.parametrize("name", ["llama", "opt", "mamba", "mixtral"])
def test_padding_never_counts(name: str, side: str, how: str) -> None:
    lengths, width, fill = [24, 17, 24, 9], 26, 77
    plain = [tiny.tokens(1, length, seed=seed)[0] for seed, length in enumerate(lengths)]
    ids, mask = torch.full((len(plain), width), fill), torch.zeros(len(plain), width, dtype=torch.int64)
    for row, one in enumerate(plain):
        room = width - len(one)
        start = {"right": 0, "left": room, "both": room // 2}[side]
        ids[row, start : start + len(one)] = one
        mask[row, start : start + len(one)] = 1
    padded = [
        {"input_ids": ids[:2], "attention_mask": mask[:2]},
        {"input_ids": ids[2].tolist(), "attention_mask": mask[2].tolist()},
        {"input_ids": ids[3], "attention_mask": mask[3].bool()},
    ]
    results = [llmprune.prune(tiny.build(name), **{**settings(how), "calibration": data}) for data in (plain, padded)]
    states = [result.model.state_dict() for result in results]
    assert all(same_bytes(tensor, states[1][key]) for key, tensor in states[0].items())
    assert results[0].report["tensors"] == results[1].report["tensors"]
    assert results[0].report["calibration"] == results[1].report["calibration"]
    assert results[0].report["calibration"]["tokens"] == sum(lengths)


# --- experts ---


@pytest.mark.parametrize("how", SCHEDULES)
@pytest.mark.parametrize("name", tiny.FUSED)
def test_reported_tokens_of_the_experts_add_up(name: str, how: str, runs: Runs) -> None:
    counted: dict[str, int] = {}
    for row in runs.streamed(name, how).report["tensors"]:
        base, _, index = row["name"].partition("[")
        if index:
            counted[base] = counted.get(base, 0) + row["tokens"]
    chosen = tiny.TINY[name].num_experts_per_tok
    assert counted and set(counted.values()) == {tiny.tokens().numel() * chosen}


@pytest.mark.parametrize("how", SCHEDULES)
def test_all_experts_reports_all_tokens(how: str) -> None:
    result = llmprune.prune(tiny.build("qwen3-moe"), **{"calibration.all_experts": True}, **settings(how))
    assert {row["tokens"] for row in result.report["tensors"]} == {tiny.tokens().numel()}


def starved(name: str) -> PreTrainedModel:
    """A model whose layer 1 never chooses expert 3."""
    model = tiny.build(name)
    if name == "gpt-oss":
        model.model.layers[1].mlp.router.bias.data[3] = -1e4
    else:  # one expert a token, and the first or the second scores above 0
        weight = model.model.layers[1].feed_forward.router.weight.data
        weight[1], weight[3] = -weight[0], 0
    return model


@pytest.mark.parametrize("how", SCHEDULES)
@pytest.mark.parametrize("pattern", ["", "2:4"])
@pytest.mark.parametrize("name", ["gpt-oss", "llama4"])
def test_an_expert_without_tokens_is_pruned_by_magnitude(name: str, pattern: str, how: str) -> None:
    dense = {key: weight.clone() for key, (weight, _) in products(starved(name)).items()}
    model = starved(name)
    report = llmprune.prune(model, **settings(how, pattern)).report
    unseen = {row["name"]: row for row in report["tensors"] if row["tokens"] == 0}
    assert sorted(key.partition(".experts.")[2] for key in unseen) == ["down_proj[3]", "gate_up_proj[3]"]
    assert all(".layers.1." in key and "magnitude" in row["notes"]["fallback"] for key, row in unseen.items())
    assert any("2 expert matrices saw no calibration token" in warning for warning in report["warnings"])
    for key, (weight, axis) in products(model).items():
        if key in unseen:
            kept = weight != 0
            assert torch.equal(weight[kept], dense[key][kept])
            if pattern:
                groups = (kept.T if axis == 0 else kept).unflatten(1, (-1, 4))
                assert bool((groups.sum(-1) == 2).all())
            else:
                assert int(kept.sum()) == kept.numel() // 2
                assert float(dense[key][~kept].abs().max()) <= float(weight[kept].abs().min())


@pytest.mark.parametrize("how", SCHEDULES)
@pytest.mark.parametrize("name", ["gpt-oss", "llama4"])
def test_an_expert_without_tokens_may_be_an_error(name: str, how: str) -> None:
    with pytest.raises(RunError, match=r"model\.layers\.1\..*experts\.(gate_up|down)_proj\[3\]: no calibration token"):
        llmprune.prune(starved(name), **{"calibration.unseen": "error"}, **settings(how))
