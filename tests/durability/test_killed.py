"""Runs that were killed or interrupted go on, to the same bytes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from durable import DEMO, LAYERS, QUICK, failed, is_no_model, kill, layers_done, report, resumes, run
from runner import Forked, Ran, cli, count_steps, product
from transformers import AutoModelForCausalLM

import llmprune
from llmprune.checkpoint import output


def test_two_runs_give_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    assert cli(*run(tmp_path / "out")).code == 0
    assert product(tmp_path / "out") == product(whole)
    assert report(tmp_path / "out") == report(whole)


# Kills.


@pytest.mark.parametrize("place", [0.0, 0.2, 0.45])
def test_killed_anywhere(whole: Path, steps: int, tmp_path: Path, place: float) -> None:
    kill(tmp_path / "out", int(steps * place) + random.Random(f"{place}").randrange(steps // 5))
    assert not (tmp_path / "out").exists()
    resumes(tmp_path / "out", whole)


@pytest.mark.parametrize("from_end", [1, 2, 3, 6, 9, 10, 12])
def test_killed_while_it_is_completed(whole: Path, steps: int, tmp_path: Path, from_end: int) -> None:
    kill(tmp_path / "out", steps - from_end)
    # the last step of all removes the lock from the finished folder
    assert (tmp_path / "out").exists() == (from_end == 1)
    ran = resumes(tmp_path / "out", whole)
    # nine steps before the end the report is there: from then on nothing is left to compute
    assert ("already finished" in ran.err) == (from_end < 10)


def test_killed_again_and_again(whole: Path, steps: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kill(out, steps // 4)
    kill(out, steps // 4, "--resume")
    kill(out, steps // 4, "--resume")
    resumes(out, whole)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_at_a_random_moment(whole: Path, tmp_path: Path, seed: int) -> None:
    out = tmp_path / "out"
    seconds = json.loads((whole / "llmprune.json").read_text())["run"]["seconds"]
    child = Forked(*run(out), log=tmp_path / "log")
    time.sleep(random.Random(seed).uniform(0.2, 1.0) * seconds)
    child.send(signal.SIGKILL)
    child.wait()
    resumes(out, whole)


@pytest.mark.parametrize("options", [("--schedule", "module"), ("--method", "magnitude"), ("--method", "auto")])
def test_killed_in_other_modes(tmp_path: Path, options: tuple[str, str]) -> None:
    (tmp_path / "whole").mkdir()
    whole = tmp_path / "whole" / "out"
    total = count_steps(*run(whole, *options), folder=whole.parent)
    (tmp_path / "killed").mkdir()
    kill(tmp_path / "killed" / "out", total // 3, *options)
    resumes(tmp_path / "killed" / "out", whole, *options)


def test_killed_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # as for a model that is too large to be joined into one file
    monkeypatch.setattr(output, "JOIN_BYTES", 0)
    (tmp_path / "whole").mkdir()
    whole = tmp_path / "whole" / "out"
    total = count_steps(*run(whole), folder=whole.parent)
    assert len(list(whole.glob("model-*-of-00006.safetensors"))) == 1 + LAYERS
    assert not (whole / "model.safetensors").exists()
    AutoModelForCausalLM.from_pretrained(whole)
    for at in (total // 2, total - 3):
        out = tmp_path / f"killed-{at}" / "out"
        out.parent.mkdir()
        kill(out, at)
        resumes(out, whole)


def test_a_resumed_run_does_not_solve_again_what_is_done(whole: Path, half: Path) -> None:
    done = layers_done(half)
    assert 0 < done < LAYERS
    ran = resumes(half, whole)
    assert f"resuming: {done} of {LAYERS} layers are done" in ran.err
    solved = set(re.findall(r"model\.layers\.(\d)\.", ran.err))
    assert solved == {str(number) for number in range(done, LAYERS)}


# Interruptions.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(whole: Path, tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "out"
    child = Forked(*run(out), log=tmp_path / "log")
    child.says("model.layers.2.")
    child.send(number)
    ran = child.wait()
    failed(ran)
    assert "interrupted" in ran.err
    assert not out.exists()
    is_no_model(tmp_path / "out.partial")
    resumes(out, whole)


def verified_by(verify: Callable[..., object], tmp_path: Path) -> Ran:
    """A run to `out` whose result is looked at by another function."""

    def replace() -> None:
        sys.modules["llmprune.job"].verify = verify  # type: ignore[attr-defined]

    return Forked(*run(tmp_path / "out"), log=tmp_path / "log", before=replace).wait()


def test_interrupted_while_it_is_verified(whole: Path, tmp_path: Path) -> None:
    # by then weights and config are all there, but nobody has looked at them yet
    ran = verified_by(lambda *_, **__: os.kill(os.getpid(), signal.SIGINT), tmp_path)
    failed(ran)
    is_no_model(tmp_path / "out.partial")
    resumes(tmp_path / "out", whole)


def test_interrupted_where_python_drops_exceptions(whole: Path, tmp_path: Path) -> None:
    class Finalized:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    def verify(*_: object, **__: object) -> None:
        Finalized()
        time.sleep(60)

    ran = verified_by(verify, tmp_path)
    failed(ran)
    assert "interrupted" in ran.err
    resumes(tmp_path / "out", whole)


def test_an_interrupt_that_something_swallows_ends_the_run(whole: Path, tmp_path: Path) -> None:
    def verify(*_: object, **__: object) -> str:
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return "verified"

    ran = verified_by(verify, tmp_path)
    failed(ran)
    assert "interrupted" in ran.err
    is_no_model(tmp_path / "out.partial")
    resumes(tmp_path / "out", whole)


def test_a_process_interrupted_from_the_keyboard(whole: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llmprune", *map(str, run(tmp_path / "out"))]
    # whoever started the tests in the background may have switched Ctrl-C off, and a child inherits that
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    assert child.stderr is not None
    for line in child.stderr:
        if "model.layers.1." in line:
            child.send_signal(signal.SIGINT)
            break
    out, err = child.communicate(timeout=60)
    failed(Ran(child.returncode, out, err))
    resumes(tmp_path / "out", whole)


@pytest.mark.parametrize("place", [0.02, 0.7])
def test_what_an_unfinished_run_leaves_is_no_model(steps: int, tmp_path: Path, place: float) -> None:
    kill(tmp_path / "out", int(steps * place))
    is_no_model(tmp_path / "out.partial")
    ran = cli("prune", tmp_path / "out.partial", "--out", tmp_path / "other", "--sparsity", 0.5)
    assert ran.code == 2 and "no config.json" in ran.err


def test_a_failed_run_can_be_resumed_in_the_same_process(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as in a notebook, which keeps the exception, and with it everything that its frames hold
    def broken(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    settings: dict[str, Any] = {"out": tmp_path / "out", "sparsity": 0.5, "calibration": QUICK[1]}
    settings |= {"method": "sparsegpt", "samples": 4, "seqlen": 64}
    with monkeypatch.context() as patched, pytest.raises(llmprune.RunError, match="no space left") as kept:
        patched.setattr(output, "save_file", broken)
        llmprune.prune(DEMO, **settings)
    llmprune.prune(DEMO, **settings, resume=True)
    assert "no space left" in str(kept.value)
    assert product(tmp_path / "out") == product(whole)


def test_interrupted_while_libraries_are_loaded() -> None:
    program = """
import os, runpy, signal, sys
class Interrupting:
    def find_spec(self, name, *_):
        if name == "llmprune.cli":
            os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, Interrupting())
runpy.run_module("llmprune", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, "error: interrupted\n")
