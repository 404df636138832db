"""What is pruned and how much: names and patterns, amounts of single layers, allocation, the dry run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from plans import ALL, DEMO, having, plan
from runner import cli, tree
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import llmprune
from llmprune import UserError
from llmprune.plan import matches


def chosen(*options: object) -> list[str]:
    return [row["name"] for row in plan("--sparsity", 0.5, *options)["tensors"]]


# Names.


@pytest.mark.parametrize(
    ("pattern", "name", "hit"),
    [
        # whole names, with and without the ending
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight", True),
        ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj.weight", True),
        # runs of dotted parts, never parts of parts
        ("up_proj", "model.layers.0.mlp.up_proj.weight", True),
        ("mlp", "model.layers.0.mlp.up_proj.weight", True),
        ("mlp.up_proj", "model.layers.0.mlp.up_proj.weight", True),
        ("layers.0", "model.layers.0.mlp.up_proj.weight", True),
        ("layers.1", "model.layers.10.mlp.up_proj.weight", False),
        ("0", "model.layers.10.mlp.up_proj.weight", False),
        ("proj", "model.layers.0.mlp.up_proj.weight", False),
        ("up", "model.layers.0.mlp.up_proj.weight", False),
        ("layers.mlp", "model.layers.0.mlp.up_proj.weight", False),
        # a dot is a dot
        ("layers.0.mlp", "model.layers.0xmlp.up_proj.weight", False),
        # globs match the whole name
        ("*.up_proj", "model.layers.0.mlp.up_proj.weight", True),
        ("*.up_proj.weight", "model.layers.0.mlp.up_proj.weight", True),
        ("*up*", "model.layers.0.mlp.up_proj.weight", True),
        ("model.layers.?.mlp.*", "model.layers.0.mlp.up_proj.weight", True),
        ("model.layers.?.mlp.*", "model.layers.10.mlp.up_proj.weight", False),
        ("up_*", "model.layers.0.mlp.up_proj.weight", False),
        ("*.UP_PROJ", "model.layers.0.mlp.up_proj.weight", False),
        # regular expressions match from the start
        ("re:.*up_proj", "model.layers.0.mlp.up_proj.weight", True),
        ("re:.*up_proj$", "model.layers.0.mlp.up_proj.weight", True),
        ("re:model", "model.layers.0.mlp.up_proj.weight", True),
        ("re:up_proj", "model.layers.0.mlp.up_proj.weight", False),
        (r"re:model\.layers\.(0|2)\.", "model.layers.2.mlp.up_proj.weight", True),
        (r"re:model\.layers\.(0|2)\.", "model.layers.20.mlp.up_proj.weight", False),
        # experts, with and without their number
        ("experts", "model.layers.0.mlp.experts.gate_up_proj[3]", True),
        ("gate_up_proj", "model.layers.0.mlp.experts.gate_up_proj[3]", True),
        ("*.gate_up_proj", "model.layers.0.mlp.experts.gate_up_proj[3]", True),
        ("gate_up_proj[3]", "model.layers.0.mlp.experts.gate_up_proj[3]", True),
        ("gate_up_proj[1]", "model.layers.0.mlp.experts.gate_up_proj[3]", False),
        (r"re:.*\[3\]", "model.layers.0.mlp.experts.gate_up_proj[3]", True),
        (r"re:.*\[3\]", "model.layers.0.mlp.experts.gate_up_proj[13]", False),
    ],
)
def test_patterns(pattern: str, name: str, hit: bool) -> None:
    assert matches(pattern, name) == hit


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (None, ALL),
        ("q_proj", having("q_proj")),
        ("q_proj, down_proj", having("q_proj", "down_proj")),
        ("layers.1", having("layers.1.")),
        ("layers.1.mlp,layers.3.self_attn.o_proj", having("layers.1.mlp", "layers.3.self_attn.o_proj")),
        ("*.layers.?.mlp.*", having("mlp")),
        (r"re:.*layers\.[0-2]\..*_proj", having("layers.0.", "layers.1.", "layers.2.")),
        ("re:.*layers.(1|4).*[qk]_proj", having("1.self_attn.q", "1.self_attn.k", "4.self_attn.q", "4.self_attn.k")),
        ("*", ALL),
    ],
)
def test_targets_and_ignore(targets: str | None, names: list[str]) -> None:
    if targets is None:
        assert chosen() == names
        return
    assert chosen("--targets", targets) == names
    if names != ALL:
        assert chosen("--ignore", targets) == [name for name in ALL if name not in names]


@pytest.mark.parametrize("target", ["embed_tokens", "model.norm"])
def test_a_target_that_is_never_pruned(target: str) -> None:
    ran = cli("prune", DEMO, "--sparsity", 0.5, "--dry-run", "--targets", f"q_proj,{target}")
    assert ran.code == 2 and f"target '{target}' matches only model." in ran.err, ran.err
    assert "never pruned" in ran.err
    # left out it may be
    assert cli("prune", DEMO, "--sparsity", 0.5, "--dry-run", "--ignore", target).code == 0


@pytest.mark.parametrize(("key", "value"), [("device", "meta"), ("dtype", "bfloat16")])
def test_a_loaded_model_stays_as_it_is(key: str, value: str) -> None:
    model = tiny.build("llama")
    with pytest.raises(UserError, match=rf"engine\.{key}={value} has no meaning for a loaded model"):
        llmprune.prune(model, method="magnitude", sparsity=0.5, **{key: value})
    own = {"device": "cpu", "dtype": "float32"}[key]
    assert llmprune.prune(model, method="magnitude", sparsity=0.5, **{key: own}).report[key] == own


def test_ignore_wins_over_targets() -> None:
    assert chosen("--targets", "mlp", "--ignore", "layers.2,up_proj") == [
        name for name in having("mlp") if "layers.2." not in name and "up_proj" not in name
    ]


def test_what_is_left_alone_is_listed_with_its_reason() -> None:
    left = plan("--sparsity", 0.5, "--targets", "mlp", "--ignore", "layers.2")["left_alone"]
    mlp = set(having("mlp"))
    assert left == {
        **{name: "not among the targets" for name in ALL if name not in mlp},
        **{name: "ignored" for name in mlp if "layers.2." in name},
    }


def test_experts(tmp_path: Path) -> None:
    model = tiny.build("mixtral")
    names = [
        f"model.layers.1.mlp.experts.{kind}[{expert}]" for kind in ("gate_up_proj", "down_proj") for expert in range(4)
    ]

    def of(**settings: Any) -> list[str]:
        report = llmprune.prune(model, method="magnitude", sparsity=0.5, dry_run=True, **settings).report
        return [row["name"] for row in report["tensors"] if ".layers.1.mlp." in row["name"]]

    assert of() == of(targets="experts") == names
    assert of(targets="layers.1.mlp.experts.down_proj") == names[4:]
    assert of(ignore="down_proj[2]") == [name for name in names if name != "model.layers.1.mlp.experts.down_proj[2]"]
    assert of(targets=r"re:.*\[[13]\]") == [name for name in names if name[-2] in "13"]


# The dry run.


@pytest.mark.parametrize(
    "options", [("--sparsity", 0.55), ("--pattern", "2:4"), ("--sparsity", 0.3, "--ignore", "mlp")]
)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_dry_run_plans_what_is_then_done(tmp_path: Path, method: str, options: tuple[object, ...]) -> None:
    run = ("prune", DEMO, "--method", method, *options, "--samples", 3, "--seqlen", 32, "--json")
    dry = cli(*run, "--dry-run", "--out", tmp_path / "out")
    assert dry.code == 0 and not list(tmp_path.iterdir())
    done = cli(*run, "--out", tmp_path / "out")
    planned, report = json.loads(dry.out), json.loads(done.out)
    assert planned["tensors"] == [{key: row[key] for key in ("name", "shape", "planned")} for row in report["tensors"]]
    for key in ("recipe", "calibration", "left_alone"):
        assert planned[key] == report[key]
    assert planned["totals"]["zeros"] == report["totals"]["zeros"]
    assert planned["totals"]["weights"] == sum(row["shape"][0] * row["shape"][1] for row in report["tensors"])
    assert (planned["calibration"] is None) == (method == "magnitude")


def test_a_dry_run_says_what_it_would_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    before = tree(DEMO)
    ran = cli("prune", DEMO, "--sparsity", 0.5, "--targets", "q_proj", "--samples", 3, "--seqlen", 32, "--dry-run")
    assert ran.code == 0, ran.err
    assert "5 matrices, 10,240 of 20,480 weights would become zero; 30 others are left alone" in ran.out
    assert all(name in ran.out for name in having("q_proj")) and "64x64" in ran.out and "2,048" in ran.out
    assert tree(DEMO) == before and not list(tmp_path.iterdir())


def test_a_dry_run_finds_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    assert cli("prune", DEMO, "--sparsity", 0.5, "--dry-run", "--out", tmp_path / "out").code == 2
    assert cli("prune", DEMO, "--pattern", "2:5", "--dry-run").code == 2


# The head.

TOKENS = [row.tolist() for row in tiny.tokens(6, 16)]


@pytest.mark.parametrize("schedule", ["layer", "module"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_an_untied_head_is_pruned_if_it_is_named(tmp_path: Path, method: str, schedule: str) -> None:
    tiny.save("llama", tmp_path / "model")
    dense = load_file(tmp_path / "model" / "model.safetensors")
    settings = {"method": method, "sparsity": 0.5, "calibration": TOKENS, "schedule": schedule}
    result = llmprune.prune(tmp_path / "model", out=tmp_path / "out", targets="lm_head", **settings)
    assert [row["name"] for row in result.report["tensors"]] == ["lm_head.weight"]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert [name for name in dense if not torch.equal(dense[name], stored[name])] == ["lm_head.weight"]
    pruned = stored["lm_head.weight"] == 0
    assert int(pruned.sum()) == dense["lm_head.weight"].numel() // 2
    if method == "sparsegpt":
        # what is kept makes up for what is gone
        assert not torch.equal(stored["lm_head.weight"][~pruned], dense["lm_head.weight"][~pruned])
        return
    # nothing before the head has changed: its inputs are those of the dense model
    model = tiny.build("llama")
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1).double()))
    with torch.no_grad():
        model(input_ids=torch.tensor(TOKENS))
    weight = dense["lm_head.weight"].double()
    norms = torch.cat(seen).norm(dim=0)
    if method == "wanda":
        order = (weight.abs() * norms).argsort(dim=1, stable=True)
        expected = torch.zeros_like(pruned).scatter(1, order[:, : weight.shape[1] // 2], True)
    else:
        expected = torch.zeros(weight.numel(), dtype=torch.bool)
        expected[weight.abs().ravel().argsort(stable=True)[: weight.numel() // 2]] = True
        expected = expected.view_as(pruned)
    assert torch.equal(pruned, expected)


def test_the_head_beside_other_targets() -> None:
    def of(**settings: Any) -> list[str]:
        model = tiny.build("llama")
        found = llmprune.prune(model, method="magnitude", sparsity=0.5, dry_run=True, **settings)
        return [row["name"] for row in found.report["tensors"]]

    q_projs = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(3)]
    assert of(targets="q_proj,lm_head") == [*q_projs, "lm_head.weight"]
    assert of(targets=["re:lm_", "q_proj"]) == [*q_projs, "lm_head.weight"]
    # it is pruned only when it is named itself: a pattern that takes in everything does not mean it
    assert len(of()) == len(of(targets="*")) == len(of(targets="re:.*")) == 21
    assert "lm_head.weight" not in of(targets="*")


def test_a_tied_head_is_refused(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                         num_attention_heads=2, tie_word_embeddings=True))  # fmt: skip
    with pytest.raises(UserError, match=r"target 'lm_head': lm_head.weight is the embedding matrix \(tied weights\)"):
        llmprune.prune(model, method="magnitude", sparsity=0.5, targets="lm_head")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="tied"):
        llmprune.prune(tmp_path / "model", out=tmp_path / "out", method="magnitude", sparsity=0.5, targets="lm_head")
    assert isinstance(model.lm_head, nn.Linear) and [path.name for path in tmp_path.iterdir()] == ["model"]
