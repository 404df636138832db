"""What several processes cost and change: time of two against one, and how far masks and perplexity agree.

Time: the model of `peers.py` (random Llama, 32 x 512 tokens, float32), SparseGPT 50 %, one thread a process,
sides taking turns. Agreement: tales-llama, 64 x 256 tokens of its calibration text. Time it on a quiet machine;
the load of other jobs is recorded beside the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import peer_workers
import record
from safetensors.torch import load_file

TIMED = {"sparsegpt, layer": ("sparsegpt", "layer"), "sparsegpt, module": ("sparsegpt", "module")}
COMPARED = ("sparsegpt", "wanda", "admm", "auto")
EVALUATED = "tales-eval.txt"


def launch(count: int, *command: str) -> None:
    """Run a Python command line in `count` processes of one thread."""
    several = ("-m", "torch.distributed.run", "--nproc-per-node", str(count)) if count > 1 else ()
    run = [sys.executable, *several, *command]
    subprocess.run(run, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def worker(folder: Path, method: str, schedule: str) -> None:
    """What every process of a timed run does."""
    import llmprune

    tokens = json.loads((folder / "tokens.json").read_text())
    out, sizes = folder / "out", {"batch_size": peer_workers.BATCH, "schedule": schedule}
    llmprune.prune(folder / "model", out=out, overwrite=True, method=method, sparsity=0.5, calibration=tokens, **sizes)


def timed(folder: Path, method: str, schedule: str, repeats: int) -> dict[str, Any]:
    """Seconds of one and of two processes, by turns."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(repeats):
        for count, taken in seconds.items():
            launch(count, __file__, "--worker", str(folder), method, schedule)
            taken.append(json.loads((folder / "out" / "llmprune.json").read_text())["run"]["seconds"])
    one, two = (statistics.median(taken) for taken in seconds.values())
    return {"seconds": seconds, "speedup": one / two}


def agreement(folder: Path, method: str) -> dict[str, Any]:
    """How many zeros lie elsewhere with two processes, or in a smaller batch, than with one; and what that changes."""
    import llmprune

    model, data = record.SHARED / "models" / "tales-llama", record.SHARED / "data"
    text = f"file:{data / 'tales-calibration.txt'}"
    options = ("--method", method, "--sparsity", "0.5", "--calibration", text, "--samples", "64", "--seqlen", "256")
    ways = {
        "one process": (1, ()),
        "two": (2, ()),
        "one, batch size 4": (1, ("--batch-size", "4")),
        "one, ordered": (1, ("--set", "engine.reduce=ordered")),
        "two, ordered": (2, ("--set", "engine.reduce=ordered")),
    }
    states, found = {}, {}
    for way, (count, more) in ways.items():
        out = ("--out", str(folder / "out"), "--quiet", "--overwrite")
        launch(count, "-m", "llmprune", "prune", str(model), *out, *options, *more)
        states[way] = load_file(folder / "out" / "model.safetensors")
        spec = f"file:{data / EVALUATED}"
        found[way] = {
            "ppl": llmprune.evaluate(folder / "out", perplexity=[spec], seqlen=256)["perplexity"][spec]["ppl"]
        }
        base = states["one, ordered" if way == "two, ordered" else "one process"]
        other = sum(int(((one == 0) != (states[way][key] == 0)).sum()) for key, one in base.items())
        found[way]["other_masks"] = other / sum(one.numel() for one in base.values())
        found[way]["same_bytes"] = all(bool((one == states[way][key]).all()) for key, one in base.items())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", nargs=3, metavar=("FOLDER", "METHOD", "SCHEDULE"))
    arguments = parser.parse_args()
    if arguments.worker:
        worker(Path(arguments.worker[0]), *arguments.worker[1:])
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        peer_workers.write_inputs({"model": folder / "model", "tokens": folder / "tokens.json"})
        load = os.getloadavg()[0]
        times = {name: timed(folder, *case, arguments.repeats) for name, case in TIMED.items()}
        agree = {method: agreement(folder, method) for method in COMPARED}
    rows = [
        [name, *(f"{statistics.median(one):.1f} s" for one in found["seconds"].values()), f"{found['speedup']:.2f}"]
        for name, found in times.items()
    ]
    text = record.table(["method, schedule", "1 process", "2 processes", "times as fast"], rows)
    text += f"\nMedian of {arguments.repeats}, one thread a process; other jobs' load when it began: {load:.1f}.\n\n"
    rows = [
        [method, way, f"{one['other_masks']:.4%}", str(one["same_bytes"]), f"{one['ppl']:.3f}"]
        for method, found in agree.items()
        for way, one in found.items()
    ]
    text += record.table(["method", "run", "weights with another mask", "same bytes", "perplexity"], rows)
    text += (
        "\ntales-llama, 50 %, 64 x 256 tokens of tales-calibration.txt, seed 0; perplexity on tales-eval.txt in windows of 256. "
        "Masks and bytes are compared with one process, the last row of a method with one ordered process.\n"
    )
    record.save("ranks", {"environment": record.environment(), "load": load, "times": times, "agreement": agree}, text)


if __name__ == "__main__":
    main()
