"""What must not be mixed or lost: other runs, two at once, complete results."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from durable import DEMO, QUICK, kill, run
from runner import Forked, Ran, Steps, cli, product, tree
from safetensors.torch import load_file, save_file

import llmprune
from llmprune import record
from llmprune.checkpoint import output
from llmprune.job import Job
from llmprune.restructuring import Restructuring

# What is resumed must be the same run.


def other_model(folder: Path) -> Path:
    shutil.copytree(DEMO, folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file({key: one * 1.01 for key, one in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "options",
    [
        ("--sparsity", 0.4),
        ("--seed", 1),
        ("--samples", 3),
        ("--method", "wanda"),
        ("--set", "damping=0.02"),
        ("--schedule", "module"),
        ("--batch-size", 2),
        ("--ignore", "q_proj"),
        ("--calibration", "TEXT"),
        ("MODEL",),
        ("CONFIG",),
    ],
)
def test_resuming_another_run_is_refused(half: Path, tmp_path: Path, options: tuple[object, ...]) -> None:
    (tmp_path / "text.txt").write_text("Once upon a time there was a dog who liked to run and play. " * 40)
    command = [f"file:{tmp_path}/text.txt" if one == "TEXT" else one for one in run(half, "--resume", *options)]
    if options[0] in ("MODEL", "CONFIG"):
        command.remove(options[0])
        command[1] = other_model(tmp_path / "model") if options[0] == "MODEL" else other_config(tmp_path / "model")
    before = tree(tmp_path)
    ran = cli(*command)
    assert ran.code == 2 and "another recipe, model, calibration text" in ran.err, ran.err
    assert f"{half}.partial" in ran.err and "--overwrite" in ran.err
    assert tree(tmp_path) == before


def test_resuming_with_another_text_under_the_same_name_is_refused(steps: int, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a dog who liked to run and play. " * 40)
    options = ("--calibration", f"file:{text}", "--samples", 2)
    kill(tmp_path / "out", steps * 2 // 5, *options)
    text.write_text("Once upon a time there was a cat who liked to run and play. " * 40)
    ran = cli(*run(tmp_path / "out", "--resume", *options))
    assert ran.code == 2 and "another recipe, model, calibration text" in ran.err, ran.err


def other_config(folder: Path) -> Path:
    shutil.copytree(DEMO, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-6}))
    return folder


def test_an_unfinished_run_is_not_begun_again_unasked(whole: Path, half: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    ran = cli(*run(half))
    assert ran.code == 2 and "unfinished run" in ran.err
    assert "--resume" in ran.err and "--overwrite" in ran.err
    assert tree(tmp_path) == before
    # --overwrite starts anew: nothing of the other run is left
    (tmp_path / "out.partial" / "stray.json").write_text("{}")
    ran = cli(*run(half, "--overwrite"))
    assert ran.code == 0 and "resuming" not in ran.err
    assert product(half) == product(whole)


def test_a_complete_result_is_not_lost_to_another_run(whole: Path, steps: int, tmp_path: Path) -> None:
    # the journal is gone by then, but the report says whose result this is
    out = tmp_path / "out"
    kill(out, steps - 2, "--seed", 1)
    (tmp_path / "out.partial" / "stray.json").write_text("{}")
    before = tree(tmp_path)
    ran = cli(*run(out, "--resume"))
    assert ran.code == 2 and "another recipe, model, calibration text" in ran.err, ran.err
    assert tree(tmp_path) == before
    assert cli(*run(out, "--overwrite")).code == 0
    assert product(out) == product(whole)


@pytest.mark.parametrize("options", [("--resume",), ("--overwrite",)])
def test_two_runs_at_once(whole: Path, steps: int, tmp_path: Path, options: tuple[str, ...]) -> None:
    out = tmp_path / "out"
    halt = Steps(tmp_path, steps // 2, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    first = Forked(*run(out), log=tmp_path / "log", before=halt.install)
    try:
        first.stops()
        before = tree(tmp_path)
        second = cli(*run(out, *options))
        assert second.code == 2 and "another run is writing" in second.err, second.err
        assert tree(tmp_path) == before
    finally:
        first.send(signal.SIGCONT)
    assert first.wait().code == 0
    assert product(out) == product(whole)


@pytest.mark.parametrize("amount", [("--method", "magnitude", "--sparsity", 0.5), ("--drop-layers", 1)])
def test_nothing_is_decided_for_a_run_that_cannot_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amount: tuple[object, ...]
) -> None:
    def attempt(out: Path, *options: object) -> Ran:
        return cli("prune", DEMO, "--out", out, *amount, *QUICK, *options)

    out = tmp_path / "out"
    assert attempt(out).code == 0
    # what an allocation or a search may take hours for
    for owner, name in ((Job, "budgets"), (Restructuring, "_decide")):
        monkeypatch.setattr(owner, name, lambda *_: pytest.fail("decided"))
    ran = attempt(out, "--resume")
    assert ran.code == 0 and "already finished" in ran.err, ran.err
    # another run has decided nothing yet
    other = output.Output(tmp_path / "two", "another")
    other.claim(resume=False)
    before = tree(tmp_path)
    ran = attempt(tmp_path / "two")
    assert ran.code == 2 and "another run is writing" in ran.err, ran.err
    assert tree(tmp_path) == before
    other.open()
    other.close()
    ran = attempt(tmp_path / "two", "--resume")
    assert ran.code == 2 and "another recipe, model, calibration text" in ran.err, ran.err
    assert tree(tmp_path).keys() == {*before, "two.partial/journal.jsonl"}


def test_a_run_that_is_refused_late_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # an allocation may find that there is no way, when the folder is claimed already
    def none(*_: object) -> None:
        raise llmprune.UserError("there is no such allocation")

    monkeypatch.setattr(Job, "budgets", none)
    ran = cli(*run(tmp_path / "out"))
    assert ran.code == 2 and "no such allocation" in ran.err
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    "amount",
    [
        ("--method", "laco", "--drop-layers", 1),
        ("--method", "group-obs", "--ratio", 0.25),
        ("--method", "slicegpt", "--ratio", 0.25),
    ],
)
def test_layers_with_other_values_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amount: tuple[object, ...]
) -> None:
    def attempt(*options: object) -> Ran:
        return cli("prune", DEMO, "--out", tmp_path / "out", *amount, *QUICK, *options)

    write = output.Output.write

    def full(self: output.Output, unit: str, *rest: Any) -> None:
        if unit != "rest":
            raise llmprune.RunError("the disk is full")
        write(self, unit, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(output.Output, "write", full)
        assert attempt().code == 1
    # as where another number of threads sums in another order: values differ in the last bit
    digest = record.digest
    with monkeypatch.context() as patched:
        moved = torch.tensor(1 + 2**-23)
        patched.setattr(record, "digest", lambda tensors: digest({n: moved * one for n, one in tensors.items()}))
        ran = attempt("--resume")
        assert ran.code == 1 and "came to other values" in ran.err, ran.err
    assert attempt("--resume").code == 0
