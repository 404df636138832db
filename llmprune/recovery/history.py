"""The report of a pruned model, and what a recovery adds to it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from llmprune.checkpoint.output import REPORT_NAME
from llmprune.inspection import inspect
from llmprune.memory import PeakMemory
from llmprune.recipe import Recipe
from llmprune.record import cost, versions
from llmprune.types import Outcome, UserError

# The method of a model that llmprune did not prune.
UNKNOWN = "unknown"
# Shape (outputs, inputs) of a matrix, and how many of its weights are zero.
Zeros = tuple[tuple[int, int], int]


def read_history(folder: Path) -> dict[str, Any]:
    """The report in a folder; of a model that llmprune did not make, what its bytes say."""
    path = folder / REPORT_NAME
    if path.is_file():
        try:
            report: dict[str, Any] = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(
                f"{path} is no report of llmprune ({error}); remove it, or prune the model again"
            ) from error
        return report
    found = inspect(str(folder))
    totals = found["totals"]
    recipe = Recipe(model=str(folder), method=UNKNOWN, sparsity=totals["zeros"] / totals["params"])
    return {
        "recipe": recipe.model_dump(mode="json"),
        "versions": versions(),
        "device": "unknown",
        "dtype": "unknown",
        "calibration": None,
        "layout": "plain",
        "tensors": [],
        "left_alone": {},
        "warnings": [],
        "totals": {"params_before": totals["params"], "params_after": totals["params"], "zeros": totals["zeros"]},
        "run": {"seconds": 0.0},
    }


def parent_of(report: dict[str, Any]) -> str:
    """The dense model that a report's model was pruned from; raises UserError where it is not known."""
    model: str = report["recipe"]["model"]
    if report["recipe"]["method"] == UNKNOWN or not model:
        raise UserError("the dense model is not known: name it with --teacher")
    return model


def with_recovery(
    report: dict[str, Any], entry: dict[str, Any], zeros: dict[str, Zeros] | None, params: int | None = None
) -> dict[str, Any]:
    """The report of a recovered model: that of the pruned one, with `entry` after the recoveries before it.

    `zeros`: shape and zeros of every matrix, `params`: of the model, where they are not those of before. What was measured of the pruned
    model is kept in the entry, since it no longer holds.
    """
    kept = {key: value for key, value in report.items() if key not in ("fingerprint", "evaluation")}
    entry = {**entry, "evaluation_before": report.get("evaluation")}
    found = {**kept, "recovery": [*report.get("recovery", []), entry]}
    if zeros is not None:
        rows = (Outcome(name, shape, count, count, None, "weight", None) for name, (shape, count) in zeros.items())
        found["tensors"] = [dataclasses.asdict(row) for row in rows]
        found["totals"] = {**report["totals"], "zeros": sum(count for _, count in zeros.values())}
    if params is not None:
        found["totals"] = {**found["totals"], "params_after": params}
    return found


def run_record(memory: PeakMemory, started: float, device: torch.device, processes: int = 1) -> dict[str, Any]:
    """What a recovery took; `started` by `time.perf_counter`."""
    return {
        **cost(memory, started, processes),
        "device": device.type,
    }
