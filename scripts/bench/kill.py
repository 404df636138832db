"""Kill a run at many seeded points, resume it each time, and compare the bytes with an undisturbed run."""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record

# What "same bytes" covers; llmprune.json also holds timings.
COMPARED = ("*.safetensors", "*.index.json", "config.json", "generation_config.json", "tokenizer*")


def command(model: Path, text: Path, out: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "llmprune", "prune", str(model), "--out", str(out)),
        *("--method", "sparsegpt", "--sparsity", "0.5", "--calibration", f"file:{text}"),
        *("--samples", "64", "--seqlen", "256", "--resume", "--quiet"),
    ]


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for pattern in COMPARED for path in folder.glob(pattern))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def lines(partial: Path) -> int:
    """How many lines the journal of an unfinished run has."""
    journal = partial / "journal.jsonl"
    try:
        return journal.read_bytes().count(b"\n")
    except OSError:
        return 0


def killed(run: list[str], reached: Callable[[], bool], delay: float, errors: Any = subprocess.DEVNULL) -> bool:
    """Start a run and kill it `delay` seconds after it has come so far; whether it still ran then."""
    process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=errors)
    while process.poll() is None and not reached():
        time.sleep(0.002)
    time.sleep(delay)
    running = process.poll() is None
    process.kill()
    process.wait()
    return running


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tales-llama")
    parser.add_argument("--text", default="tales-calibration.txt")
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model, text = record.SHARED / "models" / arguments.model, record.SHARED / "data" / arguments.text
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    folder = Path(tempfile.mkdtemp())
    subprocess.run(command(model, text, folder / "whole"), check=True, stdout=subprocess.DEVNULL)
    expected = digest(folder / "whole")
    generator = random.Random(arguments.seed)
    rows: list[dict[str, Any]] = []
    for number in range(1, arguments.points + 1):
        # the journal has a line for the start, one for what lies outside the layers, and one a layer
        progress, delay = generator.randrange(layers + 3), generator.uniform(0, 0.2)
        out = folder / "killed"
        shutil.rmtree(out, ignore_errors=True)
        run, partial = command(model, text, out), folder / "killed.partial"
        running = killed(run, lambda partial=partial, progress=progress: lines(partial) >= progress, delay)
        left = lines(partial)
        subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
        rows.append({"running": running, "journal": left, "delay_s": round(delay, 3), "same": digest(out) == expected})
        print(f"{number}: {rows[-1]}", flush=True)
    shutil.rmtree(folder)
    same = sum(row["same"] for row in rows)
    table = record.table(
        ["journal lines when killed", "still running", "same bytes"],
        [[str(row["journal"]), str(row["running"]), str(row["same"])] for row in rows],
    )
    table += f"\n{same} of {len(rows)} byte-identical after SIGKILL and `--resume`, {len(expected)} files compared; "
    table += f"{arguments.model}, SparseGPT 50 %, 64 x 256 tokens of its calibration text, seed {arguments.seed} for the points. "
    table += f"A whole journal has {layers + 2} lines and is removed at the end: 0 lines and not running is a finished run.\n"
    record.save("kill", {"environment": record.environment(), "rows": rows}, table)
    sys.exit(same != len(rows))


if __name__ == "__main__":
    main()
