"""Where the time of a SparseGPT run goes, on the model of `peers.py` (random Llama, 32 x 512 tokens, float32).

Also measures each run without the profiler in three ways: as shipped, with torch's own float32 products
(`LLMPRUNE_KERNELS=torch`), and with bfloat16 forward passes.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import peer_workers
import record

PARTS = {
    "Gram matrices": ("gram_update_",),
    "solving": ("_prune",),
    "writing and checking": ("write", "finish"),
    "attention": ("scaled_dot_product_attention",),
}
WAYS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "as shipped": ({}, {}),
    "torch's products": ({"LLMPRUNE_KERNELS": "torch"}, {}),
    "bfloat16 forward": ({}, {"dtype": "bfloat16"}),
}


def run(folder: Path, schedule: str, settings: dict[str, Any], *, profile: bool) -> dict[str, float]:
    """One run; the seconds of its parts if profiled, else of the whole."""
    import transformers.models.llama.modeling_llama  # noqa: F401 (imports are on no clock)

    import llmprune

    prune = llmprune.prune
    tokens = json.loads((folder / "tokens.json").read_text())
    profiler = cProfile.Profile()
    started = time.perf_counter()
    if profile:
        profiler.enable()
    with tempfile.TemporaryDirectory() as out:
        prune(
            folder / "model",
            out=Path(out) / "out",
            method="sparsegpt",
            sparsity=0.5,
            calibration=tokens,
            schedule=schedule,
            **settings,
        )
        seconds = time.perf_counter() - started
    profiler.disable()
    if not profile:
        return {"whole": seconds}
    stats = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    found = {part: sum(row[3] for (file, _, name), row in stats.items() if _is(part, file, name)) for part in PARTS}
    return {
        **found,
        "the rest: products, norms, activations of the model": seconds - sum(found.values()),
        "whole": seconds,
    }


def _is(part: str, file: str, name: str) -> bool:
    if part == "writing and checking":
        return name in PARTS[part] and file.endswith("checkpoint/output.py")
    if part == "attention":
        return any(one in name for one in PARTS[part]) and "built-in" in name
    return name in PARTS[part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", nargs=4, metavar=("FOLDER", "SCHEDULE", "SETTINGS", "PROFILE"))
    arguments = parser.parse_args()
    if arguments.worker:
        folder, schedule, settings, profile = arguments.worker
        print(json.dumps(run(Path(folder), schedule, json.loads(settings), profile=profile == "yes")))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        peer_workers.write_inputs({"model": folder / "model", "tokens": folder / "tokens.json"})
        measured = {
            schedule: {
                "profile": worker(folder, schedule, {}, {}, "yes"),
                **{way: worker(folder, schedule, *WAYS[way], "no")["whole"] for way in WAYS},
            }
            for schedule in ("layer", "module")
        }
    rows = [
        [schedule, part, f"{seconds:.1f} s"]
        for schedule, found in measured.items()
        for part, seconds in found["profile"].items()
    ]
    text = record.table(["schedule", "part (under the profiler)", "time"], rows) + "\n"
    text += record.table(
        ["schedule", *WAYS],
        [[schedule, *(f"{found[way]:.1f} s" for way in WAYS)] for schedule, found in measured.items()],
    )
    record.save("where", {"environment": record.environment(), "measured": measured}, text)


def worker(folder: Path, schedule: str, variables: dict[str, str], settings: dict[str, Any], profile: str) -> Any:
    command = [sys.executable, __file__, "--worker", str(folder), schedule, json.dumps(settings), profile]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | variables)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
