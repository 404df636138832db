"""Peak memory of the width methods that need gradients, or the whole model, against model size.

Synthetic bfloat16 Llama checkpoints that differ in depth only (see `memory.py`), pruned by a tenth on 8 x 64 random
tokens, seed 0, each run in a process of its own: the peak of anonymous resident memory, which is what the process itself
allocated. The result is not reloaded for a check, as it would be where a second copy takes a quarter of what is free at
most: for checkpoints as small as these that copy would be the peak.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import memory
import record

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "llm-pruner first": ("llm-pruner", {}),
    "llm-pruner second": ("llm-pruner", {"taylor": "second"}),
    "group-fisher": ("group-fisher", {}),
    "wanda-sp (no gradients)": ("wanda-sp", {}),
    "bonsai (whole model, forward)": ("bonsai", {"masks": 2, "sequences": 1}),
}
RUN = """
import json, sys, torch, llmprune, llmprune.checkpoint.verify
llmprune.checkpoint.verify.SHARE = 0.0
model, out, method, options = sys.argv[1:]
tokens = torch.randint(0, {vocabulary}, (8, 64), generator=torch.Generator().manual_seed(0))
result = llmprune.prune(
    model, out=out, method=method, options=json.loads(options), ratio=0.1, calibration=list(tokens), batch_size=1
)
print(json.dumps(result.report["run"]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="folder for the checkpoints")
    arguments = parser.parse_args()
    saved: dict[str, Any] = {"rows": {}, "bytes": {}, **record.load("gradient_memory")}
    for layers in arguments.layers:
        folder = Path(tempfile.mkdtemp(dir=arguments.scratch))
        try:
            (folder / "model").mkdir()
            saved["bytes"][str(layers)] = memory.make_checkpoint(folder / "model", layers)
            for label in arguments.methods:
                if str(layers) in saved["rows"].get(label, {}):
                    continue
                method, options = METHODS[label]
                run = [sys.executable, "-c", RUN.format(vocabulary=memory.VOCABULARY), str(folder / "model")]
                run += [str(folder / label), method, json.dumps(options)]
                done = subprocess.run(run, check=True, capture_output=True, text=True)
                peak = json.loads(done.stdout)["peak_memory"]["anonymous"]
                saved["rows"].setdefault(label, {})[str(layers)] = peak
                save(saved)
        finally:
            shutil.rmtree(folder)


def save(saved: dict[str, Any]) -> None:
    sizes = sorted(saved["bytes"], key=int)
    heads = ["peak anonymous memory", *(f"{layers} layers, {saved['bytes'][layers] / 1e9:.2f} GB" for layers in sizes)]
    rows = [
        [label, *(f"{peaks[layers] / 1e9:.3f} GB" if layers in peaks else "–" for layers in sizes)]
        for label, peaks in saved["rows"].items()
    ]
    text = record.table(heads, rows)
    text += (
        "\nA layer is 0.26 GB in bfloat16, 0.52 GB in float32, in which it runs. 8 x 64 random tokens one sequence at a time, "
        "ratio 0.1, seed 0; CPU; without the check that reloads the result.\n"
    )
    record.save("gradient_memory", {**saved, "environment": record.environment()}, text)


if __name__ == "__main__":
    main()
