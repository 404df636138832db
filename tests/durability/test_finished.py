"""What a finished run leaves, and what replaces it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from durable import DEMO, LAYERS, QUICK, kill, report, run
from runner import cli, count_steps, product, tree
from safetensors.torch import load_file

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
