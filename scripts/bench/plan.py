"""How far the forecast of a run (memory, time) is from what it takes, on the models of `peers.py` and `memory.py`.

Every run is a process of its own. Time it on a quiet machine; the load of other jobs is recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import memory
import peer_workers
import record

SMALL, WIDE = "4 layers of 1024, 32 x 512 tokens, float32", "2 layers of 4096, 8 x 256 tokens, stored in bfloat16"
CASES = (
    (SMALL, {"method": "sparsegpt", "sparsity": 0.5}),
    (SMALL, {"method": "sparsegpt", "sparsity": 0.5, "schedule": "module"}),
    (SMALL, {"method": "wanda", "sparsity": 0.5}),
    (SMALL, {"method": "auto", "sparsity": 0.5}),
    (WIDE, {"method": "sparsegpt", "pattern": "2:4"}),
)


def worker(model: str, tokens: str, out: str, settings: str) -> None:
    import llmprune

    ids = json.loads(Path(tokens).read_text())
    run = llmprune.prune(model, out=out, calibration=ids, overwrite=True, **json.loads(settings)).report["run"]
    print(json.dumps({key: run[key] for key in ("forecast", "seconds", "peak_memory", "notes")}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", nargs=4, metavar=("MODEL", "TOKENS", "OUT", "SETTINGS"))
    arguments = parser.parse_args()
    if arguments.worker:
        worker(*arguments.worker)
        return
    rows: list[dict[str, Any]] = []
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        small, wide = Path(scratch) / "small", Path(scratch) / "wide"
        for folder in (small, wide):
            folder.mkdir()
        peer_workers.write_inputs({"model": small / "model", "tokens": small / "tokens.json"})
        memory.make_checkpoint(wide / "model", 2)
        (wide / "tokens.json").write_text(json.dumps([[(7 * i + j) % 8192 for j in range(256)] for i in range(8)]))
        for name, settings in CASES:
            folder = small if name == SMALL else wide
            paths = [str(folder / part) for part in ("model", "tokens.json", "out")]
            command = [sys.executable, __file__, "--worker", *paths, json.dumps(settings)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append({"model": name, "settings": settings, **json.loads(done.stdout)})
            print(json.dumps(rows[-1]), flush=True)
    lines = []
    for row in rows:
        foreseen, peak = row["forecast"]["memory"], row["peak_memory"]["anonymous"]
        expected, took = row["forecast"]["seconds"], row["seconds"]
        lines.append(
            [
                row["model"],
                f"{row['settings']['method']}, {row['forecast']['schedule']}",
                *(f"{foreseen / 2**20:.0f} MiB", f"{peak / 2**20:.0f} MiB", f"{foreseen / peak - 1:+.0%}"),
                *(f"{expected:.1f} s", f"{took:.1f} s", f"{expected / took - 1:+.0%}"),
            ]
        )
    text = record.table(
        ["model", "run", "memory foreseen", "peak", "off by", "time foreseen", "taken", "off by"], lines
    )
    text += f"\nAnonymous memory of the process; other jobs' load when it began: {load:.1f}. Seed 0.\n"
    record.save("plan", {"environment": record.environment(), "load": load, "rows": rows}, text)


if __name__ == "__main__":
    main()
