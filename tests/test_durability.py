"""Whatever ends a run early, nothing half-finished looks finished, and `--resume` ends with the same bytes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runner import Forked, Ran, Steps, cli, count_steps, product, tree
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import llmprune
from llmprune import record
from llmprune.checkpoint import output
from llmprune.job import Job
from llmprune.restructuring import Restructuring

DEMO = Path(llmprune.__file__).parent / "demo" / "model"
QUICK = ("--calibration", f"file:{DEMO.parent}/eval.txt", "--samples", 4, "--seqlen", 64)
LAYERS = 5


def run(out: Path, *options: object) -> tuple[object, ...]:
    return ("prune", DEMO, "--out", out, "--method", "sparsegpt", "--sparsity", 0.5, *QUICK, *options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    ran = cli(*run(out))
    assert ran.code == 0, ran.err
    return out


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many steps such a run takes."""
    folder = tmp_path_factory.mktemp("steps")
    return count_steps(*run(folder / "out"), folder=folder)


def kill(out: Path, at: int, *options: object) -> None:
    """Run until just before step `at`, and kill."""
    steps = Steps(out.parent, at)
    ran = Forked(*run(out, *options), log=out.parent / f"log-{at}", before=steps.install).wait()
    assert ran.code == -signal.SIGKILL, ran.err


@pytest.fixture(scope="module")
def killed(steps: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves that was killed half-way."""
    out = tmp_path_factory.mktemp("killed") / "out"
    kill(out, steps * 2 // 5)
    return out.with_name("out.partial")


@pytest.fixture
def half(killed: Path, tmp_path: Path) -> Path:
    """The output of a run that was killed half-way: only its partial folder is there."""
    shutil.copytree(killed, tmp_path / "out.partial")
    return tmp_path / "out"


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


def test_interrupted_while_it_is_verified(whole: Path, tmp_path: Path) -> None:
    # by then weights and config are all there, but nobody has looked at them yet
    def interrupt_in_verification() -> None:
        sys.modules["llmprune.job"].verify = lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)  # type: ignore

    ran = Forked(*run(tmp_path / "out"), log=tmp_path / "log", before=interrupt_in_verification).wait()
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

    ran = Forked(
        *run(tmp_path / "out"),
        log=tmp_path / "log",
        before=lambda: setattr(sys.modules["llmprune.job"], "verify", verify),
    ).wait()
    failed(ran)
    assert "interrupted" in ran.err
    resumes(tmp_path / "out", whole)


def test_an_interrupt_that_something_swallows_ends_the_run(whole: Path, tmp_path: Path) -> None:
    def verify(*_: object, **__: object) -> str:
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return "verified"

    ran = Forked(
        *run(tmp_path / "out"),
        log=tmp_path / "log",
        before=lambda: setattr(sys.modules["llmprune.job"], "verify", verify),
    ).wait()
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


# A full disk.


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A small disk: `disk(KIB)` makes or resizes it, and returns where it lies."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = False

    def resize(kib: int) -> Path:
        nonlocal mounted
        options = f"remount,size={kib}k" if mounted else f"size={kib}k"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"needs a small disk of its own, but mount says: {done.stderr.strip()}")
        mounted = True
        return place

    yield resize
    if mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize(("kib", "step"), [(120, 300), (2076, 12)])
def test_disk_full(disk: Callable[[int], Path], whole: Path, kib: int, step: int) -> None:
    # large steps fill the disk in the layers, small ones while the folder is completed
    messages = []
    place = disk(kib)
    while (ran := cli(*run(place / "out", "--resume", "--quiet"))).code:
        failed(ran)
        assert "No space left on device" in ran.err and str(place / "out.partial") in ran.err
        assert not (place / "out").exists()
        is_no_model(place / "out.partial")
        messages.append(ran.err)
        kib += step
        disk(kib)
    # an attempt that failed at the very end must not need more room than the first one
    assert kib < 2300
    assert len(messages) >= 2
    assert any("cannot write" in one if step > 100 else "cannot complete" in one for one in messages)
    assert product(place / "out") == product(whole)
    assert report(place / "out") == report(whole)
    assert [path.name for path in place.iterdir()] == ["out"]


def test_disk_full_leaves_an_existing_output_alone(disk: Callable[[int], Path], whole: Path) -> None:
    place = disk(1800)
    shutil.copytree(whole, place / "out")
    failed(cli(*run(place / "out", "--overwrite", "--quiet", "--seed", 1)))
    assert tree(place / "out") == tree(whole)


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


# Damage to what lies in the partial folder.


def tear(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text(path.read_text() + '{"unit": "model.layers.3", "fi'),
        lambda path: path.write_bytes(path.read_bytes() + b'{"unit": "\xff'),
        lambda path: tear(path, path.stat().st_size - 1),
        lambda path: tear(path, 30),
        lambda path: tear(path, 0),
        lambda path: path.unlink(),
    ],
    ids=["begun line", "no text", "no newline", "torn first line", "empty", "gone"],
)
def test_damaged_journal(whole: Path, half: Path, damage: Callable[[Path], object]) -> None:
    damage(half.with_name("out.partial") / "journal.jsonl")
    resumes(half, whole)


def test_a_torn_line_costs_only_its_own_layer(whole: Path, half: Path) -> None:
    done = layers_done(half)
    journal = half.with_name("out.partial") / "journal.jsonl"
    tear(journal, journal.stat().st_size - 40)
    assert f"resuming: {done - 1} of {LAYERS} layers" in resumes(half, whole).err


@pytest.mark.parametrize("ending", ["", '{"unit": "model.layers.3", "fi'])
def test_a_torn_journal_is_mended_before_it_grows(whole: Path, half: Path, steps: int, ending: str) -> None:
    journal = half.with_name("out.partial") / "journal.jsonl"
    done = layers_done(half)
    journal.write_text(journal.read_text().removesuffix("\n") + (ending and "\n" + ending))
    # two more layers, the first of which would be lost with the line that it is glued to
    kill(half, 7, "--resume")
    assert all(json.loads(line) for line in journal.read_text().splitlines())
    assert layers_done(half) > done
    resumes(half, whole)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model-00002-of-00006.safetensors", lambda path: tear(path, path.stat().st_size - 4)),
        ("model-00002-of-00006.safetensors", lambda path: tear(path, 0)),
        ("model-00002-of-00006.safetensors", lambda path: path.write_bytes(b"\1" * path.stat().st_size)),
        ("model-00003-of-00006.safetensors", lambda path: path.unlink()),
        ("model-00001-of-00006.safetensors", lambda path: path.unlink()),
    ],
    ids=["truncated", "empty", "garbage", "gone", "rest gone"],
)
def test_damaged_part(whole: Path, half: Path, name: str, damage: Callable[[Path], object]) -> None:
    done = layers_done(half)
    damage(half.with_name("out.partial") / name)
    ran = resumes(half, whole)
    assert f"resuming: {done - ('00001' not in name)} of {LAYERS} layers" in ran.err


# An existing output.


def test_a_finished_run_is_not_repeated(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.iterdir()}
    for options in ((), ("--overwrite",)):
        ran = cli(*run(out, "--resume", *options))
        assert ran.code == 0 and "already finished" in ran.err
        assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.iterdir()} == before
    assert not (tmp_path / "out.partial").exists()
    # another recipe is not finished by that
    ran = cli(*run(out, "--resume", "--seed", 1))
    assert ran.code == 2 and "exists" in ran.err
    assert product(out) == product(whole)


def test_overwriting(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli(*run(out, "--method", "magnitude")).code == 0
    # what a run that was killed in the middle of this has left, and what is none of ours
    shutil.copytree(whole, tmp_path / "out.partial" / "replaced")
    shutil.copytree(whole, tmp_path / "out.replaced")
    old = product(out)
    assert cli(*run(out, "--overwrite")).code == 0
    assert product(out) == product(whole) != old
    assert tree(tmp_path / "out.replaced") == tree(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.replaced"]


def test_overwriting_an_empty_folder_and_a_link(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    assert cli(*run(tmp_path / "out", "--overwrite")).code == 0
    assert (tmp_path / "out").is_symlink()
    assert product(tmp_path / "real") == product(whole)


def test_the_old_output_stays_whole_until_the_new_one_is(whole: Path, tmp_path: Path) -> None:
    def begin(name: str) -> Path:
        (tmp_path / name).mkdir()
        shutil.copytree(whole, tmp_path / name / "out")
        return tmp_path / name / "out"

    options = ("--method", "magnitude")
    new = tmp_path / "new" / "out"
    assert cli(*run(new, *options)).code == 0
    counted = begin("counted")
    total = count_steps(*run(counted, *options, "--overwrite"), folder=counted.parent)
    states = []
    for at in [total // 2, *range(total - 4, total)]:
        out = begin(f"killed-{at}")
        kill(out, at, *options, "--overwrite")
        if out.exists():
            beside = ("lock", "replaced")
            there = {name: digest for name, digest in product(out).items() if not name.startswith(beside)}
            states.append("old" if there == product(whole) else "new")
            assert there in (product(whole), product(new))
        else:
            # between two renames: both are whole, under other names
            states.append("between")
            assert product(out.with_name("out.partial") / "replaced") == product(whole)
            assert (out.with_name("out.partial") / "llmprune.json").is_file()
        ran = cli(*run(out, *options, "--overwrite", "--resume"))
        assert ran.code == 0, ran.err
        assert product(out) == product(new)
    assert states == ["old", "old", "old", "between", "new"]


def test_the_input_is_never_touched(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in model.iterdir()}
    for path in [*model.iterdir(), model]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    ran = cli("prune", model, "--out", tmp_path / "out", "--sparsity", 0.5, *QUICK)
    assert ran.code == 0, ran.err
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in model.iterdir()} == before


# llmprune.json.


def test_report(whole: Path) -> None:
    found = json.loads((whole / "llmprune.json").read_text())
    assert {"recipe", "versions", "calibration", "tensors", "totals", "run", "layout"} <= set(found)
    assert found["layout"] == "plain"
    assert {"llmprune", "torch", "transformers"} <= set(found["versions"])
    assert found["recipe"]["seed"] == 0 and found["recipe"]["sparsity"] == 0.5
    assert (found["calibration"]["source"], found["calibration"]["tokens"]) == (QUICK[1], 4 * 64)
    assert re.fullmatch("[0-9a-f]{64}", found["calibration"]["hash"])
    stored, dense = load_file(whole / "model.safetensors"), load_file(DEMO / "model.safetensors")
    assert len(found["tensors"]) == 7 * LAYERS
    for row in found["tensors"]:
        weight = stored[row["name"]]
        assert row["shape"] == list(weight.shape)
        assert row["planned"] == row["achieved"] == int((weight == 0).sum()) == weight.numel() // 2
        assert 0 < row["error"] < 1
        assert row["tokens"] == 4 * 64
    pruned = {row["name"] for row in found["tensors"]}
    assert {key for key in dense if not torch.equal(dense[key], stored[key])} == pruned
    assert found["totals"]["zeros"] == sum(int((stored[name] == 0).sum()) for name in pruned)
    total = sum(one.numel() for one in dense.values())
    assert found["totals"]["params_before"] == found["totals"]["params_after"] == total
    assert found["run"]["seconds"] > 0
    assert found["run"]["peak_memory"]["resident"] >= found["run"]["peak_memory"]["anonymous"] > 2**20
    assert set(found["run"]["matrix_seconds"]) == pruned


@pytest.mark.parametrize(
    "options",
    [
        ("--pattern", "2:4", "--method", "wanda", "--schedule", "module"),
        ("--sparsity", 0.3, "--method", "magnitude", "--allocation", "global"),
        (
            *("--sparsity", 0.6, "--seed", 3, "--batch-size", 2, "--targets", "mlp,q_proj", "--ignore", "layers.1"),
            *("--set", "damping=1e-3", "--set", "overrides=[{targets: down_proj, pattern: 2:4}]"),
        ),
    ],
)
def test_the_stored_recipe_gives_the_same_bytes(tmp_path: Path, options: tuple[object, ...]) -> None:
    ran = cli("prune", DEMO, "--out", tmp_path / "one", *QUICK, *options)
    assert ran.code == 0, ran.err
    stored = json.loads((tmp_path / "one" / "llmprune.json").read_text())["recipe"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(stored) if "--pattern" in options else yaml.safe_dump(stored))
    again = cli("prune", "--recipe", recipe, "--out", tmp_path / "two")
    assert again.code == 0, again.err
    assert product(tmp_path / "two") == product(tmp_path / "one")
    assert report(tmp_path / "two") == report(tmp_path / "one")
