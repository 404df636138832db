"""Runs of the demo model that are stopped on the way."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from runner import Forked, Ran, Steps, cli, product
from transformers import AutoModelForCausalLM

import llmprune

DEMO = Path(llmprune.__file__).parent / "demo" / "model"
QUICK = ("--calibration", f"file:{DEMO.parent}/eval.txt", "--samples", 4, "--seqlen", 64)
LAYERS = 5


def run(out: Path, *options: object) -> tuple[object, ...]:
    return ("prune", DEMO, "--out", out, "--method", "sparsegpt", "--sparsity", 0.5, *QUICK, *options)


def kill(out: Path, at: int, *options: object) -> None:
    """Run until just before step `at`, and kill."""
    steps = Steps(out.parent, at)
    ran = Forked(*run(out, *options), log=out.parent / f"log-{at}", before=steps.install).wait()
    assert ran.code == -signal.SIGKILL, ran.err


def layers_done(out: Path) -> int:
    """How many layers the journal of a partial folder lists; its first lines are the fingerprint and the rest."""
    return len((out.with_name("out.partial") / "journal.jsonl").read_text().splitlines()) - 2


def resumes(out: Path, whole: Path, *options: object) -> Ran:
    """A resumed run must end as one that nothing disturbed, and leave nothing beside its output."""
    ran = cli(*run(out, "--resume", *options))
    assert ran.code == 0, ran.err
    assert product(out) == product(whole)
    assert report(out) == report(whole)
    assert {path.name for path in out.parent.iterdir() if not path.name.startswith("log")} == {out.name}
    return ran


def report(out: Path) -> dict[str, Any]:
    """llmprune.json without the part that may differ."""
    found: dict[str, Any] = json.loads((out / "llmprune.json").read_text())
    del found["run"]
    return found


def is_no_model(folder: Path) -> None:
    """Neither transformers nor llmprune takes `folder` for a model."""
    assert not (folder / "config.json").exists()
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(folder)
    for command in ("eval", "inspect"):
        refusal = cli(command, folder, *(("--perplexity", "demo") if command == "eval" else ()))
        assert refusal.code == 2 and "no config.json" in refusal.err


def failed(ran: Ran) -> None:
    """The run failed as a run: exit code 1, one message that says how to go on."""
    assert ran.code == 1, ran.err
    assert ran.out == ""
    assert [line.startswith("error:") for line in ran.err.splitlines()].count(True) == 1, ran.err
    assert "--resume" in ran.err
    assert "Traceback" not in ran.err
