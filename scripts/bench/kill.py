"""Kill a run at many seeded points, resume it each time, and compare the bytes with an undisturbed run."""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


def killed_run(run: list[str], after: float) -> bool:
    """Start a run and kill it after some seconds; whether it was still running then."""
    process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(timeout=after)
        return False
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tales-llama")
    parser.add_argument("--text", default="tales-calibration.txt")
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model, text = record.SHARED / "models" / arguments.model, record.SHARED / "data" / arguments.text
    folder = Path(tempfile.mkdtemp())
    started = time.monotonic()
    subprocess.run(command(model, text, folder / "whole"), check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - started
    expected = digest(folder / "whole")
    # importing takes the first part of a run: kills that hit it test nothing but themselves
    points = [random.Random(arguments.seed).uniform(0.3, 1.0) * seconds for _ in range(arguments.points)]
    rows = []
    for number, after in enumerate(points, 1):
        out = folder / "killed"
        shutil.rmtree(out, ignore_errors=True)
        run = command(model, text, out)
        hit = killed_run(run, after)
        partial = out.with_name("killed.partial")
        done = sum(1 for _ in (partial / "journal.jsonl").open()) - 1 if (partial / "journal.jsonl").exists() else 0
        subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
        rows.append(
            {"after_s": round(after, 2), "was_running": hit, "units_done": done, "same": digest(out) == expected}
        )
        print(f"{number}: {rows[-1]}", flush=True)
    shutil.rmtree(folder)
    same = sum(row["same"] for row in rows)
    where = record.environment()
    text_ = (
        record.table(
            ["kill after", "still running", "parts written by then", "same bytes"],
            [[f"{r['after_s']} s", str(r["was_running"]), str(r["units_done"]), str(r["same"])] for r in rows],
        )
        + f"\n{same} of {len(rows)} byte-identical after SIGKILL and `--resume`; undisturbed run {seconds:.1f} s; {len(expected)} files compared.\n"
    )
    record.save("kill", {"environment": where, "model": arguments.model, "seed": arguments.seed, "rows": rows}, text_)
    sys.exit(same != len(rows))


if __name__ == "__main__":
    main()
