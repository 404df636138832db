"""What a run will need is said beforehand, and decides how it goes where the recipe leaves that open."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from runner import cli, product

import llmprune
from llmprune import fitting, forecast
from llmprune.forecast import Forecast, Measured, Situation
from llmprune.job import Job
from llmprune.methods.weight.sparsegpt import SparseGPT
from llmprune.recipe import load_recipe

DEMO = Path(llmprune.__file__).parent / "demo" / "model"
TEXT = {"calibration.source": "demo", "calibration.samples": 8, "calibration.seqlen": 64}
CPU = torch.device("cpu")
MIB = 2**20


def situation(monkeypatch: pytest.MonkeyPatch, free: int) -> tuple[Situation, Job]:
    """Four batches of 1024 tokens on the demo model's layers, and so much free memory."""
    monkeypatch.setattr(forecast, "within_reach", lambda device: free)
    job = Job(
        load_recipe(None, {"model": str(DEMO), "method": "sparsegpt", "sparsity": 0.5, **TEXT}), None, None, None, None
    )
    return Situation(job.plan, SparseGPT(), 0, [1024] * 4, 8, hidden=256, layer=MIB, stored=8 * MIB), job


FOUND = Measured(0.1, 1.0, 0.5, 2.0, entered=200 * MIB, forward=64 * MIB, observed=96 * MIB, sums=32 * MIB, solving=MIB)


def test_time_is_that_of_all_batches_and_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    here, job = situation(monkeypatch, 2**40)
    unit = job.plan.units[0]
    writing = 2 * 8 * MIB / forecast.DISK
    # five layers: four batches twice forward and once summed up, the solving, and the loading
    assert here.forecast(FOUND, unit, "layer", 8, CPU).seconds == pytest.approx(5 * (4 * (2 + 0.5) + 2 + 0.1) + writing)
    assert here.forecast(FOUND, unit, "module", 8, CPU).seconds == pytest.approx(
        5 * (4 * (1 + 0.5) + 2 + 0.1) + writing
    )
    shared = dataclasses.replace(here, processes=4)
    assert shared.forecast(FOUND, unit, "layer", 8, CPU).seconds == pytest.approx(5 * (4 * 2.5 + 0.5 + 0.1) + writing)


@pytest.mark.parametrize(
    ("free", "schedules", "sizes", "expected"),
    [
        (1000, True, True, ("module", 8, True)),
        (400, True, True, ("layer", 8, True)),
        (320, True, True, ("layer", 4, True)),
        (320, True, False, ("layer", 8, False)),
        (320, False, False, ("module", 8, False)),
        (100, True, True, ("layer", 1, False)),
    ],
)
def test_the_first_way_that_fits(
    monkeypatch: pytest.MonkeyPatch, free: int, schedules: bool, sizes: bool, expected: tuple[str, int, bool]
) -> None:
    here, job = situation(monkeypatch, free * MIB)
    chosen = here.choose(FOUND, job.plan.units[0], "module", CPU, schedules=schedules, sizes=sizes)
    assert (chosen.schedule, chosen.batch_size, chosen.fits) == expected, chosen


def test_a_dry_run_tells_and_a_run_keeps_it() -> None:
    plan = cli("prune", DEMO, "--sparsity", 0.5, "--method", "wanda", "--samples", 4, "--seqlen", 32, "--dry-run")
    assert plan.code == 0 and "GiB at peak" in plan.out and "batches of 8" in plan.out


@pytest.mark.parametrize("schedule", ["layer", "module"])
def test_a_method_without_text(schedule: str) -> None:
    plan = cli("prune", DEMO, "--sparsity", 0.5, "--method", "magnitude", "--schedule", schedule, "--dry-run")
    assert plan.code == 0 and "GiB at peak" in plan.out, plan.err


def test_a_run_that_would_not_fit_goes_another_way_and_resumes_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = ("--samples", 8, "--seqlen", 64, "--quiet")
    run = ("prune", DEMO, "--sparsity", 0.5, "--method", "auto-fast", *text)
    smaller = ("--batch-size", 2, "--schedule", "layer")
    assert cli(*run, *smaller, "--out", tmp_path / "whole").code == 0
    foreseen = Forecast("layer", 2, 2**30, 1.0, 2**31)
    with monkeypatch.context() as patched:
        patched.setattr(fitting, "look_ahead", lambda *_: foreseen)
        patched.setattr(Job, "_add_files", lambda *_: (_ for _ in ()).throw(OSError("full")))
        assert cli(*run, "--out", tmp_path / "out").code == 1
    assert cli(*run, "--out", tmp_path / "out", "--resume").code == 0
    assert product(tmp_path / "out") == product(tmp_path / "whole")
    report = json.loads((tmp_path / "out" / "llmprune.json").read_text())
    assert report["recipe"]["engine"]["batch_size"] == 2 and report["recipe"]["engine"]["schedule"] == "layer"


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_first_batch_may_miss_all_that_is_pruned(method: str) -> None:
    model = tiny.build("gpt-oss")
    # no token goes to the only expert that is pruned
    model.model.layers[1].mlp.router.bias.data[3] = -1e4
    settings: dict[str, Any] = {
        "method": method,
        "sparsity": 0.5,
        "calibration": tiny.tokens(),
        "targets": [r"re:.*layers\.1\..*\[3\]"],
    }
    report = llmprune.prune(model, **settings).report
    assert {row["tokens"] for row in report["tensors"]} == {0}
