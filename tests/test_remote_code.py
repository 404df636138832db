"""`layout=remote-code`: what no plain class holds is really left out, and the checkpoint brings the code for it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmprune
from llmprune.calibration import load_tokenizer
from llmprune.checkpoint.remote import FILE, trusted
from llmprune.checkpoint.surgery import Surgery
from llmprune.methods.structural import Decision
from llmprune.removal import in_words
from llmprune.types import UserError

TEXT = [row.tolist() for row in tiny.tokens(6, 20, seed=3)]
# Zeros times weights are zeros: only sums in another order differ. Logits are up to 4, where an ulp is 2.4e-7, a dozen sums deep.
ROUNDING = 3e-6
FAMILIES = [
    *("llama", "qwen3", "gemma3", "opt", "gpt2", "gpt-neox", "phi3", "falcon"),
    *("mixtral", "qwen3-moe", "deepseek-v3", "gpt-oss"),
]


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def count(model: PreTrainedModel) -> int:
    return sum(one.numel() for one in model.parameters())


def assert_cache_changes_nothing(model: PreTrainedModel, ids: torch.Tensor) -> None:
    written = [
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*written)


@pytest.mark.parametrize("half", ["attention", "mlp"])
@pytest.mark.parametrize("name", FAMILIES)
def test_halves_left_out_are_halves_filled_with_zeros(name: str, half: str, tmp_path: Path) -> None:
    source, ids = tiny.save(name, tmp_path / "dense"), tiny.tokens(2, 12)
    settings: dict[str, Any] = {"method": "llm-drop", "drop_layers": 2, "options": {"half": half}, "calibration": TEXT}
    zeros = llmprune.prune(source, out=tmp_path / "plain", **settings)
    result = llmprune.prune(source, out=tmp_path / "small", layout="remote-code", **settings)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True).eval()
    assert float((logits(small, ids) - logits(zeros.model, ids)).abs().max()) <= ROUNDING
    assert_cache_changes_nothing(small, ids)
    # the first layers may be among them, by which caches count tokens
    rows = result.report["structure"]["scores"]
    saved = sum(row["saved"] for row in rows)
    totals = result.report["totals"]
    assert [row["dropped"] for row in rows].count(True) == 2 and saved > 0
    # what is saved besides are the norms and the like that only the halves read
    assert totals["params_after"] == count(small) <= totals["params_before"] - saved
    assert (result.report["layout"], zeros.report["layout"]) == ("remote-code", "plain")
    assert zeros.report["totals"]["params_after"] == zeros.report["totals"]["params_before"]


def test_halves_in_words() -> None:
    surgery = replace(Surgery.drop(4, [0]), silent={1: ("mlp",), 3: ("mlp",)})
    plan: Any = SimpleNamespace(units=range(4))
    assert in_words(Decision(surgery), plan) == "layers 0 of 4 go; mlp of layers 1, 3 puts out nothing"


def test_it_loads_in_a_fresh_process_without_llmprune(tmp_path: Path) -> None:
    source, ids = tiny.save("llama", tmp_path / "dense"), tiny.tokens(1, 6)
    result = llmprune.prune(
        source, out=tmp_path / "out", method="blockpruner", drop_layers=2, calibration=TEXT, layout="remote-code"
    )
    code = (
        "import sys; sys.modules['llmprune'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r}, trust_remote_code=True).eval()\n"
        f"ids = torch.tensor({ids.tolist()})\n"
        "print([float(one) for one in model(ids).logits[0, -1, :4]])\n"
        f"model.save_pretrained({str(tmp_path / 'again')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = torch.tensor(json.loads(done.stdout.strip().splitlines()[-1]))
    assert torch.allclose(found, logits(result.model, ids)[0, -1, :4], atol=ROUNDING)
    # saved by transformers itself it is the same checkpoint, code included
    assert trusted(tmp_path / "again", False)
    assert torch.equal(logits(llmprune.load(tmp_path / "again"), ids), logits(result.model, ids))


def test_our_own_code_runs_unasked_and_other_code_does_not(tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "dense")
    out = tmp_path / "out"
    llmprune.prune(source, out=out, method="llm-drop", drop_layers=1, calibration=TEXT, layout="remote-code")
    assert count(llmprune.load(out)) < count(tiny.build("llama"))
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False)
    text = (out / FILE).read_text()
    for strange in (text + "\nimport os\n", text.replace("self.items - 1", "self.items"), "import os\n" + text):
        assert strange != text
        (out / FILE).write_text(strange)
        with pytest.raises(UserError, match="--trust-remote-code"):
            llmprune.load(out)
    (out / FILE).write_text(text)
    config = json.loads((out / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = "elsewhere--modeling_pruned.PrunedLlamaForCausalLM"
    (out / "config.json").write_text(json.dumps(config))
    assert not trusted(out, False) and trusted(out, True)


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_further_stages_see_the_model_as_it_is(name: str, tmp_path: Path) -> None:
    source, ids = tiny.save(name, tmp_path / "dense"), tiny.tokens(2, 12)
    first = {"method": "llm-drop", "drop_layers": 1, "options": {"half": "mlp"}}
    others = [{"method": "keep-first", "drop_layers": [0]}, {"method": "magnitude", "sparsity": 0.5}]
    settings: dict[str, Any] = {"calibration": TEXT, "overwrite": True}
    stages = [{**first, "layout": "remote-code"}, *others]
    small = llmprune.prune(source, out=tmp_path / "small", recipe=_recipe(tmp_path, stages), **settings)
    plain = llmprune.prune(source, out=tmp_path / "plain", recipe=_recipe(tmp_path, [first, *others]), **settings)
    assert float((logits(small.model, ids) - logits(plain.model, ids)).abs().max()) <= ROUNDING
    assert_cache_changes_nothing(small.model, ids)
    entries = json.loads((tmp_path / "small" / "config.json").read_text())["pruned_layers"]
    assert len(entries) == small.model.config.num_hidden_layers == 2
    # the same on a model in memory, saved by the last stage
    model = tiny.build(name)
    result = llmprune.prune(model, out=tmp_path / "memory", recipe=_recipe(tmp_path, stages), **settings)
    for one in (result.model, llmprune.load(tmp_path / "memory")):
        assert float((logits(one, ids) - logits(small.model, ids)).abs().max()) <= ROUNDING


def _recipe(folder: Path, stages: list[dict[str, Any]]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({"stages": stages}))
    return path


def test_what_cannot_be_left_out_is_refused_and_what_is_plain_stays_plain(tmp_path: Path) -> None:
    # Bloom's attention adds the residual itself
    source = tiny.save("bloom", tmp_path / "bloom")
    settings: dict[str, Any] = {"drop_layers": 1, "calibration": TEXT, "layout": "remote-code"}
    with pytest.raises(UserError, match=r"BloomBlock does more.*layout plain"):
        llmprune.prune(source, out=tmp_path / "out", method="llm-drop", **settings)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    result = llmprune.prune(tiny.save("llama", tmp_path / "llama"), out=tmp_path / "out", method="shortgpt", **settings)
    assert result.report["layout"] == "plain" and not (tmp_path / "out" / FILE).exists()
    experts = tiny.save("mixtral", tmp_path / "mixtral")
    with pytest.raises(UserError, match="experts of every layer"):
        llmprune.prune(
            experts, out=tmp_path / "e", method="wanda-sp", ratio=0.2, calibration=TEXT, layout="remote-code"
        )
    with pytest.raises(UserError, match="always plain"):
        llmprune.prune(source, out=tmp_path / "weights", method="magnitude", sparsity=0.5, layout="remote-code")


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "opt"])
def test_layers_of_different_widths_are_the_padded_ones(name: str, tmp_path: Path) -> None:
    source, ids = tiny.save(name, tmp_path / "dense"), tiny.tokens(2, 12)
    settings: dict[str, Any] = {"method": "wanda-sp", "ratio": 0.4, "allocation": "pooled", "calibration": TEXT}
    padded = llmprune.prune(source, out=tmp_path / "plain", **settings)
    result = llmprune.prune(source, out=tmp_path / "small", layout="remote-code", **settings)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True).eval()
    assert float((logits(small, ids) - logits(padded.model, ids)).abs().max()) <= ROUNDING
    assert_cache_changes_nothing(small, ids)
    assert padded.report["totals"]["zeros"] > 0 == result.report["totals"]["zeros"]
    totals = result.report["totals"]
    assert (
        totals["params_after"]
        == count(small)
        == padded.report["totals"]["params_after"] - padded.report["totals"]["zeros"]
    )
    memory = llmprune.prune(tiny.build(name), out=tmp_path / "memory", layout="remote-code", **settings)
    for one in (memory.model, llmprune.load(tmp_path / "memory")):
        assert float((logits(one, ids) - logits(small, ids)).abs().max()) <= ROUNDING


@pytest.mark.parametrize("other", ["tokenizer", "generation"])
def test_our_code_beside_other_code_is_not_trusted(other: str, tmp_path: Path) -> None:
    """transformers would run code of a tokenizer or of generation too, if the folder were said to be trusted."""
    source = tiny.save("llama", tmp_path / "dense")
    llmprune.prune(
        source, out=tmp_path / "out", method="llm-drop", drop_layers=1, layout="remote-code", calibration=TEXT
    )
    assert trusted(tmp_path / "out", False)
    mark = tmp_path / "it ran"
    code = f"open({str(mark)!r}, 'w').write('')\n"
    if other == "tokenizer":
        config = {"tokenizer_class": "Other", "auto_map": {"AutoTokenizer": [None, "other.Other"]}}
        (tmp_path / "out" / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "out" / "other.py").write_text(code)
    else:
        (tmp_path / "out" / "custom_generate").mkdir()
        (tmp_path / "out" / "custom_generate" / "generate.py").write_text(code + "def generate(model, *_, **__): ...\n")
    assert not trusted(tmp_path / "out", False)
    for load in (llmprune.load, lambda folder: load_tokenizer(folder, False)):
        with contextlib.suppress(UserError, ValueError, OSError):
            load(tmp_path / "out")
    assert not mark.exists()
