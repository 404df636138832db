"""Full disks and damaged files."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from durable import LAYERS, failed, is_no_model, kill, layers_done, report, resumes, run
from runner import cli, product, tree

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
