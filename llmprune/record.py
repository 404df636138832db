"""What `llmprune.json` says of a run: the software, the cost, the matrices, and what the user should know."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from llmprune import __version__
from llmprune.calibration import Tokens
from llmprune.memory import PeakMemory
from llmprune.plan import Plan
from llmprune.weights import Resident, Streamed

UNUSED = "not used by the model class; carried over as it is"


def versions() -> dict[str, str]:
    """The versions that can change a result."""
    names = ("torch", "transformers", "safetensors")
    return {"llmprune": __version__, **{name: importlib.metadata.version(name) for name in names}}


def cost(memory: PeakMemory, started: float, processes: int) -> dict[str, Any]:
    """What a run took, and on what; `started` by `time.perf_counter`."""
    return {
        "seconds": round(time.perf_counter() - started, 3),
        "peak_memory": {"anonymous": memory.anonymous, "resident": memory.resident},
        "processes": processes,
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
    }


def key_of(decides: Any) -> str:
    """A hash of all that decides something, as JSON: what is done is known again by it."""
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """A hash of tensors to the last bit, by which a resumed run knows whether it came to the same."""
    found = hashlib.sha256()
    for name, one in sorted(tensors.items()):
        found.update(f"{name} {one.dtype} {tuple(one.shape)} ".encode())
        found.update(one.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def unused(weights: Streamed | Resident) -> dict[str, str]:
    """The tensors of a checkpoint that the model does not read."""
    return dict.fromkeys(weights.unused if isinstance(weights, Streamed) else [], UNUSED)


def of_matrices(plan: Plan, weights: Streamed | Resident, tokens: Tokens | None) -> dict[str, Any]:
    """What became of every matrix and layer, from what was noted when each layer was done."""
    units = [weights.records[unit.name] for unit in plan.units]
    tensors = [row for unit in units for row in unit["tensors"]]
    left_alone = dict(plan.left_alone)
    for unit in units:
        left_alone |= unit["left_alone"]
    return {
        "tensors": tensors,
        "layers": [{"name": unit.name, "fit": weights.records[unit.name]["fit"]} for unit in plan.units],
        "left_alone": left_alone | unused(weights),
        "warnings": list(warnings_of(tensors, tokens)),
    }


def warnings_of(tensors: list[dict[str, Any]], tokens: Tokens | None) -> Iterator[str]:
    """What the user should know of the pruned matrices of a report, and of the text behind them."""
    yield from tokens.warnings if tokens else ()
    unseen = [row["name"] for row in tensors if row["tokens"] == 0]
    if unseen:
        yield f"{len(unseen)} expert matrices saw no calibration token and were pruned by magnitude: {', '.join(unseen)}"
    few = [row["name"] for row in tensors if row["tokens"] and row["tokens"] < row["shape"][1]]
    if few:
        yield f"{len(few)} matrices saw fewer tokens than they have inputs, so damping decides much: {', '.join(few[:8])}"
    damped = [row["name"] for row in tensors if "damping" in row["notes"]]
    if damped:
        yield f"{len(damped)} matrices needed more damping than asked for: {', '.join(damped)}"
