"""`llmprune run`: every step once, whatever kills it, and nothing wrong found late."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import runner
import yaml
from runner import Forked, Steps, cli

import llmprune
from llmprune import UserError, hub
from llmprune.report.page import read_run

DEMO = Path(llmprune.__file__).parent / "demo" / "model"
PRUNE = {"model": str(DEMO), "method": "wanda", "sparsity": 0.5, "calibration": {"samples": 4, "seqlen": 32}}
EVAL = {"perplexity": ["demo"], "seqlen": 32, "max_windows": 2}


def write(path: Path, **sections: Any) -> Path:
    path.write_text(yaml.safe_dump({"prune": PRUNE, "eval": EVAL, "report": None, **sections}))
    return path


@pytest.fixture(autouse=True)
def _figures() -> None:
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")


def test_is_the_commands_in_a_row(tmp_path: Path) -> None:
    recipe = write(tmp_path / "recipe.yaml")
    ran = cli("run", recipe, "--out", tmp_path / "all", "--json")
    assert ran.code == 0, ran.err
    llmprune.prune(DEMO, out=tmp_path / "alone", method="wanda", sparsity=0.5, samples=4, seqlen=32)
    assert runner.product(tmp_path / "all" / "pruned") == runner.product(tmp_path / "alone")
    measured = llmprune.evaluate(tmp_path / "all" / "pruned", baseline=DEMO, **EVAL)
    report = read_run(tmp_path / "all" / "pruned")
    assert report["evaluation"] == measured
    assert json.loads(ran.out)["evaluation"] == measured
    assert f"{measured['perplexity']['demo']['ppl']:.3f}" in (tmp_path / "all" / "report.html").read_text()


def test_what_is_gone_is_made_again(tmp_path: Path) -> None:
    recipe = write(tmp_path / "recipe.yaml")
    command = ("run", recipe, "--out", tmp_path / "all")
    assert cli(*command).code == 0
    expected = runner.product(tmp_path / "all" / "pruned")
    shutil.rmtree(tmp_path / "all" / "pruned")
    ran = cli(*command)
    assert ran.code == 0, ran.err
    assert runner.product(tmp_path / "all" / "pruned") == expected
    assert "evaluation" in read_run(tmp_path / "all" / "pruned")
    (tmp_path / "all" / "report.html").unlink()
    ran = cli(*command)
    assert "prune: done before" in ran.err and "report: begins" in ran.err
    assert (tmp_path / "all" / "report.html").is_file()


def test_another_text_under_the_same_name_is_not_done_before(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a dog who liked to run and play. " * 40)
    recipe = write(tmp_path / "recipe.yaml", eval={**EVAL, "perplexity": [f"file:{text}"]})
    command = ("run", recipe, "--out", tmp_path / "all")
    assert cli(*command).code == 0
    assert "eval pruned: done before" in cli(*command).err
    text.write_text("Once upon a time there was a cat who liked to run and play. " * 40)
    ran = cli(*command)
    assert "prune: done before" in ran.err and "eval pruned: begins" in ran.err


def test_killed_anywhere_it_goes_on(tmp_path: Path) -> None:
    recipe = write(tmp_path / "recipe.yaml")
    steps = runner.count_steps("run", recipe, "--out", tmp_path / "whole", "--quiet", folder=tmp_path)
    expected = runner.product(tmp_path / "whole" / "pruned")
    for at in (*range(1, steps, 9), steps - 1):
        out = tmp_path / "killed"
        shutil.rmtree(out, ignore_errors=True)
        command = ("run", recipe, "--out", out, "--quiet")
        killed = Forked(*command, log=tmp_path / "log", before=Steps(tmp_path, at).install).wait()
        assert killed.code == -9
        ran = cli(*command)
        assert ran.code == 0, ran.err
        assert runner.product(out / "pruned") == expected
        assert read_run(out / "pruned")["evaluation"]["perplexity"]
        assert (out / "report.html").stat().st_size > 100_000
        assert {one.name for one in out.iterdir()} == {"pruned", "report.html", "run.json"}


def test_only_what_changed_is_done_again(tmp_path: Path) -> None:
    recipe, out = write(tmp_path / "recipe.yaml"), tmp_path / "out"

    def begun(*options: object) -> list[str]:
        ran = cli("run", recipe, "--out", out, *options)
        assert ran.code == 0, ran.err
        return [line.split(":")[0] for line in ran.err.splitlines() if line.endswith(": begins")]

    assert begun() == ["prune", "eval pruned", "report"]
    assert begun() == []
    assert begun("--set", "report.budget=2") == ["report"]
    assert begun("--set", "eval.max_windows=3") == ["eval pruned", "report"]
    before = runner.product(out / "pruned")
    refused = cli("run", recipe, "--out", out, "--set", "prune.sparsity=0.25")
    assert refused.code == 2 and "--overwrite" in refused.err
    assert runner.product(out / "pruned") == before
    assert begun("--set", "prune.sparsity=0.25", "--overwrite") == ["prune", "eval pruned", "report"]
    assert runner.product(out / "pruned") != before


def test_a_budget_is_found_then_pruned_recovered_and_shown(tmp_path: Path) -> None:
    for package in ("peft", "accelerate"):
        pytest.importorskip(package)
    search = {
        "methods": ["magnitude"],
        "budget": "ppl<=1.2x",
        "levels": [0.2, 0.3, 0.6],
        "perplexity": "demo",
        "max_windows": 2,
    }
    training = {"steps": 2, "batch_size": 2, "evaluate_every": 1}
    recovery = {"how": "finetune", "data": {"seqlen": 32}, "training": training}
    prune = {key: value for key, value in PRUNE.items() if key not in ("method", "sparsity")}
    recipe = write(tmp_path / "recipe.yaml", prune=prune, search=search, recover=recovery)
    command = ("run", recipe, "--out", tmp_path / "out")
    ran = cli(*command)
    assert ran.code == 0, ran.err
    found = json.loads((tmp_path / "out" / "search" / "search.json").read_text())["budget"]["best"]
    pruned, recovered = (read_run(tmp_path / "out" / name) for name in ("pruned", "recovered"))
    assert pruned["recipe"] == found["recipe"] and pruned["recipe"]["method"] == "magnitude"
    assert recovered["recovery"][0]["recipe"]["how"] == "finetune"
    page = (tmp_path / "out" / "report.html").read_text()
    for run in (pruned, recovered):
        assert f"{run['evaluation']['perplexity']['demo']['ppl']:.3f}" in page
    assert "Budget ppl&lt;=1.2x" in page and "recovered: Recovery" in page
    card = hub.push(tmp_path / "out" / "recovered", "you/small", dry_run=True)["card"]
    assert "Method: `magnitude`, 0." in card and "Recovered by `finetune`" in card and "2 steps" in card
    again = cli(*command)
    assert "begins" not in again.err
    # what is lost is made again, and nothing else
    expected = runner.product(tmp_path / "out" / "recovered")
    shutil.rmtree(tmp_path / "out" / "recovered")
    journal = json.loads((tmp_path / "out" / "run.json").read_text())
    del journal["recover"]
    (tmp_path / "out" / "run.json").write_text(json.dumps(journal))
    ran = cli(*command)
    assert [line for line in ran.err.splitlines() if line.endswith("begins")] == [
        "recover: begins",
        "eval recovered: begins",
    ]
    assert runner.product(tmp_path / "out" / "recovered") == expected


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"prune": {**PRUNE, "sparsty": 0.5}}, "did you mean 'sparsity'"),
        ({"eval": {"perplexty": ["demo"]}}, "did you mean 'perplexity'"),
        ({"eval": {"perplexity": ["file:no-such.txt"]}}, "no-such.txt"),
        ({"eval": {"tasks": ["local_piqqa"]}}, "local_piqa"),
        ({"eval": {"tasks": ["local_piqa"], "task_data": "no-such-folder"}}, "there is no piqa_valid.jsonl"),
        ({"eval": {**EVAL, "max_windows": 0}}, "max_windows 0 must be at least 1"),
        ({"eval": {}}, "say what to measure"),
        ({"recover": {"how": "finetune", "data": {"source": "file:no-such.txt"}}}, "no-such.txt"),
        ({"prune": {**PRUNE, "model": ""}}, "needs a model"),
        ({"prune": {**PRUNE, "sparsity": 1.5}}, "1.5"),
        ({"push": {}}, "push.repo_id"),
        ({"recover": {"how": "finetune", "training": {"stepps": 3}}}, "did you mean 'steps'"),
        ({"search": {"perplexity": "demo", "budgit": 3}}, "did you mean 'budget'"),
        ({"publish": {}}, "unknown recipe key 'publish'"),
    ],
)
def test_what_is_wrong_is_found_first(sections: dict[str, Any], said: str, tmp_path: Path) -> None:
    if "tasks" in str(sections):
        pytest.importorskip("lm_eval")
    with pytest.raises(UserError, match=said):
        llmprune.run(write(tmp_path / "recipe.yaml", **sections), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
