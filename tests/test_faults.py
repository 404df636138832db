"""What goes wrong outside the program: nothing is lost, nothing half-written looks whole, and the message says why."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import targets
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import edit_weights
from runner import Ran, Steps, cli, product, tree
from safetensors.torch import load_file
from transformers import AutoTokenizer

import llmprune
import llmprune.temporary
from llmprune.checkpoint.source import Checkpoint

DEMO = Path(llmprune.__file__).parent / "demo" / "model"
QUICK = ("--sparsity", 0.5, "--method", "wanda", "--samples", 2, "--seqlen", 32, "--batch-size", 1, "--quiet")

HARD = (
    b"[" * 3000,
    b"{" * 3000,
    b"9" * 5000,
    b"2024-13-45",
    b"!!python/object:os.system",
    b"../../x",
    b"\xff",
    b"1e999",
)


def prune(work: Path, *options: object) -> Ran:
    return cli("prune", work / "model", "--out", work / "out", *QUICK, *options)


def failed(ran: Ran, *says: str) -> None:
    assert ran.code == 1 and ran.err.count("error:") == 1 and "Traceback" not in ran.err, ran.err
    for text in says:
        assert text in ran.err, ran.err


def interrupted(work: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that failed at step `at`."""

    def fail() -> None:
        raise OSError("the disk has gone")

    with monkeypatch.context() as patched:
        steps = Steps(work, at, fail)
        for owner, name in ((os, "fsync"), (os, "rename"), (os, "unlink"), (shutil, "copyfile")):
            patched.setattr(owner, name, steps._counted(getattr(owner, name)))
        failed(prune(work), "the disk has gone", "--resume")


# --- files and folders ---


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(place)], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("needs a file system of its own")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_output_that_cannot_be_written(read_only: Path) -> None:
    ran = cli("prune", DEMO, "--out", read_only / "out", *QUICK)
    assert ran.code == 2 and f"{read_only} cannot be written to" in ran.err, ran.err


def test_input_that_vanishes(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = work / "whole"
    assert cli("prune", DEMO, "--out", whole, *QUICK).code == 0
    close = Checkpoint.close
    closed = 0

    def vanish(checkpoint: Checkpoint) -> None:
        nonlocal closed
        close(checkpoint)
        closed += 1
        if closed == 3:
            (work / "model" / "model.safetensors").rename(work / "elsewhere")

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "close", vanish)
        failed(prune(work), "could be read when the run began", "--resume")
    (work / "elsewhere").rename(work / "model" / "model.safetensors")
    assert prune(work, "--resume").code == 0
    assert product(work / "out") == product(whole)


def journal(work: Path) -> Path:
    return work / "out.partial" / "journal.jsonl"


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "7",
        "null",
        '{"unit": 3, "file": null}',
        '{"unit": "model.layers.0", "file": "../../model/model.safetensors", "bytes": 1, "sha256": ""}',
        '{"unit": "model.layers.0", "file": "model-00002-of-00006.safetensors"}',
        "[" * 100_000,
        "\x00\xff",
    ],
    ids=["list", "number", "null", "unit", "path", "short", "deep", "binary"],
)
def test_corrupted_journal(work: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    interrupted(work, 12, monkeypatch)
    place = 0 if line == "7" else 2  # the first line is of another kind
    lines = journal(work).read_text().splitlines()
    journal(work).write_text("\n".join([*lines[:place], line, *lines[place + 1 :]]) + "\n")
    assert prune(work, "--resume").code == 0
    state = load_file(work / "out" / "model.safetensors")
    rows = json.loads((work / "out" / "llmprune.json").read_text())["tensors"]
    assert len(rows) == 35 and all(int((state[row["name"]] == 0).sum()) == row["planned"] for row in rows)


def test_a_flipped_byte_in_a_finished_part(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(work, 12, monkeypatch)
    part = max((work / "out.partial").glob("model-*.safetensors"))
    content = bytearray(part.read_bytes())
    content[-5] ^= 1
    part.write_bytes(content)
    done = len(journal(work).read_text().splitlines()) - 2
    ran = cli("prune", work / "model", "--out", work / "out", *(one for one in QUICK if one != "--quiet"), "--resume")
    assert ran.code == 0 and f"resuming: {done - 1} of 5" in ran.err, ran.err
    assert cli("prune", work / "model", "--out", work / "whole", *QUICK).code == 0
    assert product(work / "out") == product(work / "whole")


# --- clocks and secrets ---


def test_a_clock_that_jumps(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: clock.uniform(-1e12, 1e12))
    assert prune(work).code == 0
    run = json.loads((work / "out" / "llmprune.json").read_text())["run"]
    assert 0 < run["seconds"] < 600 and all(0 <= one < 600 for one in run["matrix_seconds"].values())


def test_no_secret_is_written_or_said(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "hf_verysecret")
    ran = cli("prune", work / "model", "--out", work / "out", *(one for one in QUICK if one != "--quiet"), "--json")
    assert ran.code == 0 and "verysecret" not in ran.out + ran.err
    assert not any(b"verysecret" in path.read_bytes() for path in work.rglob("*") if path.is_file())


# --- weights, activations and texts ---


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weight(work: Path, value: float) -> None:
    edit_weights(work, lambda state: state["model.layers.3.mlp.up_proj.weight"].__setitem__((0, 0), value))
    failed(prune(work), "model.layers.3.mlp.up_proj.weight holds NaN or infinity")
    assert not (work / "out").exists()


def test_infinite_activation(work: Path) -> None:
    # finite weights whose product is not
    edit_weights(work, lambda state: state["model.layers.1.input_layernorm.weight"].fill_(3e38))
    failed(prune(work), "model.layers.1.", "NaN or infinity")


def text(work: Path, rows: list[str]) -> tuple[str, str]:
    (work / "text.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return "--calibration", f"file:{work}/text.jsonl"


def test_empty_and_tiny_documents(work: Path) -> None:
    # joined by newlines, they still make text; the empty ones must not break anything
    assert prune(work, *text(work, ["", "a", "", " ", "Once upon a time", "b"] * 40)).code == 0


@pytest.mark.parametrize("rows", [[""], ["", ""], ["a"], []])
def test_documents_that_are_no_text(work: Path, rows: list[str]) -> None:
    options = text(work, rows)
    before = tree(work)
    ran = prune(work, *options)
    assert ran.code == 2 and "too few for one sequence" in ran.err, ran.err
    assert tree(work) == before


def test_tokenizer_without_bos(work: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.bos_token = None
    tokenizer.add_bos_token = False
    tokenizer.save_pretrained(work / "model")
    assert prune(work).code == 0
    assert json.loads((work / "out" / "llmprune.json").read_text())["calibration"]["bos"] is False


def test_vocabulary_larger_than_the_embedding(work: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.add_tokens(["Once upon"])
    tokenizer.save_pretrained(work / "model")
    options = text(work, ["Once upon a time there was a dog who liked to run. " * 40])
    before = tree(work)
    ran = prune(work, *options)
    assert ran.code == 2 and "holds the token 512, but the model knows only 512" in ran.err, ran.err
    assert tree(work) == before


# --- a full device ---


def test_a_full_device_gets_smaller_batches(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmprune.methods.weight.wanda import Wanda

    whole = work / "whole"
    assert cli("prune", DEMO, "--out", whole, *QUICK, "--batch-size", 1, "--samples", 4).code == 0
    solve, calls = Wanda.solve, 0

    def full(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in (9, 20):  # the first call is that of the forecast
            raise torch.OutOfMemoryError("the device is full")
        return solve(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Wanda, "solve", full)
        assert prune(work, "--batch-size", 4, "--samples", 4).code == 0
    report = json.loads((work / "out" / "llmprune.json").read_text())
    assert [note.partition("batches of ")[2][0] for note in report["run"]["notes"]] == ["2", "1"]
    assert report["recipe"]["engine"]["batch_size"] == 1
    assert sum(row["achieved"] for row in report["tensors"]) == report["totals"]["zeros"]
    one, other = (load_file(folder / "model.safetensors") for folder in (work / "out", whole))
    moved = sum(int(((one[key] == 0) != (other[key] == 0)).sum()) for key in one)
    assert moved <= 1e-4 * sum(tensor.numel() for tensor in one.values())


def test_a_device_that_a_look_ahead_fills(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmprune.forecast import Probe

    look, sizes = Probe.run_on, []

    def full(self: Any, model: Any, batch: Any) -> Any:
        sizes.append(len(batch["input_ids"]))
        if len(batch["input_ids"]) > 2:
            raise torch.OutOfMemoryError("the device is full")
        return look(self, model, batch)

    monkeypatch.setattr(Probe, "run_on", full)
    assert prune(work, "--batch-size", 4, "--samples", 4).code == 0
    assert sizes == [4, 2]
    report = json.loads((work / "out" / "llmprune.json").read_text())
    assert "batches of 2" in report["run"]["notes"][0]
    assert report["recipe"]["engine"]["batch_size"] == 2


@pytest.mark.parametrize(
    ("owner", "name", "options"),
    [
        ("llmprune.job.Measurement", "run_on", ("--sparsity", 0.5, "--allocation", "owl")),
        ("llmprune.job.Gradients", "__init__", ("--sparsity", 0.5, "--method", "fisher")),
        ("llmprune.restructuring.Trunk", "enter", ("--drop-layers", 1, "--method", "shortgpt")),
    ],
)
def test_a_device_that_fills_elsewhere(
    owner: str, name: str, options: tuple[object, ...], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("the device is full")

    monkeypatch.setattr(f"{owner}.{name}", full)
    ran = cli("prune", work / "model", "--out", work / "out", *options, "--samples", 2, "--seqlen", 32, "--quiet")
    failed(ran, "out of memory (the device is full)", "fewer --samples")


def test_a_device_that_is_too_small(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmprune.methods.weight.wanda import Wanda

    calls, solve = 0, Wanda.solve

    def full(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise torch.OutOfMemoryError("the device is full")
        return solve(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Wanda, "solve", full)
        failed(prune(work), "out of memory", "fewer --samples", "--resume")
    assert prune(work, "--resume").code == 0


# --- a full folder for temporary files ---


@pytest.mark.parametrize("options", [("--method", "fisher"), ("--method", "grasp"), ("--method", "llm-surgeon")])
def test_a_full_folder_for_temporary_files(
    options: tuple[object, ...], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        ran = prune(work, *options)
    assert ran.code == 2 and "set TMPDIR to a larger disk" in ran.err, ran.err
    assert [path.name for path in work.iterdir()] == ["model"]
    # it may also fill while the run goes on
    monkeypatch.setattr(llmprune.temporary, "save_file", full)
    failed(prune(work, *options), "No space left on device", "set TMPDIR to a larger disk")


# --- files that are damaged in other ways ---


@pytest.mark.parametrize("name", list(targets.TARGETS))
@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_are_refused_and_nothing_worse(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    target = targets.TARGETS[name]
    seed = data.draw(st.sampled_from(target.seeds))
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(seed))] * 2)))
    middle = data.draw(st.one_of(st.binary(max_size=12), st.text(max_size=8).map(str.encode), st.sampled_from(HARD)))
    with contextlib.suppress(*targets.DOCUMENTED):
        target.run(tmp_path_factory.mktemp("target"), seed[:start] + middle + seed[end:])


def test_a_fingerprint_sees_every_tensor(work: Path) -> None:
    # one file of many windows, changed in place within the smallest matrix
    path = work / "model" / "model.safetensors"
    before = Checkpoint(work / "model").fingerprint()
    header = json.loads(path.read_bytes()[8:][: int.from_bytes(path.read_bytes()[:8], "little")])
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        data = bytearray(path.read_bytes())
        begin, end = entry["data_offsets"]
        data[start + begin : start + end] = bytes(one ^ 1 for one in data[start + begin : start + end])
        (work / "model" / "model.safetensors").write_bytes(data)
        after = Checkpoint(work / "model").fingerprint()
        assert after != before, name
        before = after


def test_a_measurement_is_shown_before_it_is_written(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, _: Any) -> None:
        raise llmprune.RunError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr("llmprune.checkpoint.output.write_json", full)
    measure = ("--perplexity", "demo", "--seqlen", 32, "--max-windows", 2, "--json")
    ran = cli("eval", DEMO, *measure, "--out", work / "found.json")
    assert ran.code == 1 and "cannot write" in ran.err
    assert json.loads(ran.out)["perplexity"]["demo"]["ppl"] > 1
