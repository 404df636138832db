"""Several processes prune as one does: same masks, same bytes where asked for, and none outlives another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runner import Steps, cli, product
from safetensors.torch import load_file

import llmprune
from llmprune import ranks
from llmprune.engine.share import share_out
from llmprune.statistics import KINDS, Sums

DEMO = Path(llmprune.__file__).parent / "demo" / "model"
TEXT = ("--calibration", "demo", "--samples", 6, "--seqlen", 48, "--batch-size", 2)
ORDERED = ("--set", "engine.reduce=ordered")


def command(out: Path, *options: object, model: Path = DEMO) -> tuple[object, ...]:
    return ("prune", model, "--out", out, "--sparsity", 0.5, *TEXT, "--quiet", *options)


def prune(count: int, folder: Path, *options: object, model: Path = DEMO) -> Path:
    out = folder / f"out-{count}"
    arguments = command(out, *options, model=model)
    runs = processes.together(count, *arguments, log=folder / "log") if count > 1 else [cli(*arguments)]
    assert [one.code for one in runs] == [0] * count, [one.err for one in runs]
    return out


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixture of experts with the demo's tokenizer; its router leaves experts without a token."""
    folder = tmp_path_factory.mktemp("experts") / "model"
    model = tiny.build("qwen3-moe")
    model.resize_token_embeddings(512)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((DEMO / name).read_bytes())
    return folder


# --- sums ---


@given(data=st.data(), batches=st.integers(1, 9), count=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_ordered_sums_do_not_depend_on_who_added_them(data: st.DataObject, batches: int, count: int) -> None:
    generator = torch.Generator().manual_seed(batches)
    inputs = [torch.randn(3 + number % 2, 5, generator=generator) for number in range(batches)]
    dense = [one + torch.randn(one.shape, generator=generator) for one in inputs]
    # a batch may hold no token for an expert
    present = data.draw(st.lists(st.booleans(), min_size=batches, max_size=batches).filter(any))
    owner = [data.draw(st.integers(0, count - 1)) for _ in range(batches)]

    def grown(numbers: list[int]) -> Sums:
        sums = Sums(5, KINDS, ordered=True)
        for number in numbers:
            if present[number]:
                sums.of(number).update(inputs[number], dense[number])
        return sums

    alone = grown(list(range(batches))).total()
    parts = [grown([number for number in range(batches) if owner[number] == one]) for one in range(count)]
    whole = parts[0]
    for part in parts[1:]:
        for key, node in part.nodes().items():
            whole.receive(key, node.tokens, node.paired, node.lacking)
            for place, tensor in zip(whole.nodes()[key].tensors(), node.tensors(), strict=True):
                place.copy_(tensor)
    total = whole.total()
    assert (total.tokens, total.paired) == (alone.tokens, alone.paired)
    assert all(torch.equal(one, other) for one, other in zip(total.tensors(), alone.tensors(), strict=True))


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("sizes", "count"), [((8, 8, 8), 2), ((8, 8, 3), 3), ((1, 1, 1, 1), 3), ((5,), 4)])
def test_every_sequence_goes_to_one_process(sizes: tuple[int, ...], count: int, ordered: bool) -> None:
    batches = [torch.arange(size).unsqueeze(1) + 100 * number for number, size in enumerate(sizes)]
    if ordered and len(sizes) < count:
        with pytest.raises(llmprune.UserError, match=f"{count} processes, but not enough"):
            share_out(batches, ranks.Ranks(0, count), ordered=True)
        return
    shares = [share_out(batches, ranks.Ranks(rank, count), ordered=ordered) for rank in range(count)]
    dealt = torch.cat([ids for share in shares for ids in share.values()])
    assert sorted(dealt[:, 0].tolist()) == torch.cat(batches)[:, 0].tolist()
    assert all(int(ids[0]) // 100 == number for share in shares for number, ids in share.items())


# --- the same result ---


@pytest.mark.parametrize("options", [("--method", "sparsegpt"), ("--method", "wanda", "--allocation", "owl")])
def test_masks_are_those_of_one_process(tmp_path: Path, options: tuple[str, ...]) -> None:
    one, three = (load_file(prune(count, tmp_path, *options) / "model.safetensors") for count in (1, 3))
    weights = sum(tensor.numel() for tensor in one.values())
    assert sum(int(((one[key] == 0) != (three[key] == 0)).sum()) for key in one) <= 1e-4 * weights
    # rounding of the sums, as the solver's condition magnifies it
    assert all(torch.allclose(one[key], three[key], atol=1e-4) for key in one)


@pytest.mark.parametrize("options", [("--method", "auto"), ("--method", "wanda", "--allocation", "owl")])
def test_ordered_runs_have_the_same_bytes(tmp_path: Path, options: tuple[str, ...]) -> None:
    folders = [prune(count, tmp_path, *options, *ORDERED) for count in (1, 2, 3)]
    assert product(folders[0]) == product(folders[1]) == product(folders[2])


@pytest.mark.parametrize("schedule", ["layer", "module"])
def test_experts(tmp_path: Path, experts: Path, schedule: str) -> None:
    options = ("--method", "sparsegpt", "--schedule", schedule, *ORDERED)
    one, two = (prune(count, tmp_path, *options, model=experts) for count in (1, 2))
    assert product(one) == product(two)
    rows = [json.loads((folder / "llmprune.json").read_text()) for folder in (one, two)]
    assert rows[0]["tensors"] == rows[1]["tensors"]
    assert [row["run"]["processes"] for row in rows] == [1, 2]


# --- ends ---


def test_a_killed_process_ends_the_others_and_the_run_resumes(tmp_path: Path) -> None:
    options = ("--method", "sparsegpt", *ORDERED)
    whole = prune(1, tmp_path, *options)
    arguments = [one for one in command(tmp_path / "out", *options) if one != "--quiet"]
    children = processes.start(3, *arguments, log=tmp_path / "log")
    children[0].says("model.layers.2.")
    children[2].send(signal.SIGKILL)
    started = time.monotonic()
    runs = [one.wait() for one in children]
    assert time.monotonic() - started < 60
    assert [one.code for one in runs] == [1, 1, -signal.SIGKILL], [one.err for one in runs]
    said = "".join(one.err for one in runs)
    assert said.count("error:") == 1 and "has ended" in said and "--resume" in said, said
    assert not (tmp_path / "out").exists()
    resumed = processes.together(2, *command(tmp_path / "out", *options, "--resume"), log=tmp_path / "log")
    assert [one.code for one in resumed] == [0, 0], [one.err for one in resumed]
    assert product(tmp_path / "out") == product(whole)


def test_a_process_that_stands_still_is_given_up(tmp_path: Path) -> None:
    def impatient(rank: int) -> None:
        ranks.BEAT_S, ranks.SILENCE_S = 0.1, 3.0
        if rank == 1:
            Steps(tmp_path, 0).install()
            stop = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
            ranks.Ranks.tell = stop  # type: ignore[method-assign,assignment]

    children = processes.start(
        2, *command(tmp_path / "out", "--method", "wanda"), log=tmp_path / "log", before=impatient
    )
    children[1].stops()
    first = children[0].wait()
    children[1].send(signal.SIGKILL)
    children[1].wait()
    assert first.code == 1 and "rank 1 (process" in first.err and "no sign of life" in first.err, first.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--sparsity", 2), "sparsity 2.0 is outside"),
        (("--batch-size", 6, *ORDERED), "number of batches: 1"),
        (("--drop-layers", 2), "works in one process"),
        (("--calibration", "file:/nowhere"), "no text file"),
    ],
)
def test_what_is_wrong_is_said_once(tmp_path: Path, options: tuple[object, ...], says: str) -> None:
    arguments = [
        one
        for one in command(tmp_path / "out", *options)
        if one not in ("--sparsity", 0.5) or "--drop-layers" not in options
    ]
    runs = processes.together(2, *arguments, log=tmp_path / "log")
    assert [one.code for one in runs] == [2, 2], [one.err for one in runs]
    said = "".join(one.err for one in runs)
    assert said.count("error:") == 1 and says in said, said
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_other_commands_run_alone(tmp_path: Path) -> None:
    runs = processes.together(2, "inspect", DEMO, log=tmp_path / "log")
    assert [one.code for one in runs] == [2, 2] and "inspect runs in one process" in runs[0].err


def test_torchrun(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "llmprune"]
    arguments = [*launch, *map(str, command(tmp_path / "out", "--method", "sparsegpt", "--json"))]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["run"]["processes"] == 2 and report["totals"]["zeros"] == 113280
