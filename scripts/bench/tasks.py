"""Three lm-eval tasks and perplexity for a dense and three pruned models, with paired tests.

Calibration: 64 sequences of 256 tokens of the model's calibration text, seed 0, schedule `layer`. Tasks: the local
ones, zero-shot, the first rows of each. Perplexity: 20 windows of 256 tokens of the evaluation text. float32.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import record

import llmprune

MODEL, TEXT = "tales-llama", "tales"
WINDOWS = 20
METHODS = ("magnitude", "wanda", "sparsegpt")
TASKS = {"local_blimp": "acc", "local_lambada": "perplexity", "local_piqa": "acc_norm"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=134)
    limit = parser.parse_args().limit
    spec = f"file:{record.SHARED / 'data' / f'{TEXT}-eval.txt'}"
    dense = record.SHARED / "models" / MODEL
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for method in METHODS:
            llmprune.prune(
                dense,
                out=Path(folder) / method,
                method=method,
                pattern="2:4",
                calibration=f"file:{record.SHARED / 'data' / f'{TEXT}-calibration.txt'}",
                samples=64,
                seqlen=256,
            )
            results[method] = llmprune.evaluate(
                Path(folder) / method,
                baseline=dense,
                perplexity=spec,
                seqlen=256,
                max_windows=WINDOWS,
                tasks=list(TASKS),
                task_data=record.SHARED / "data" / "tasks",
                limit=limit,
                batch_size=32,
                dtype="float32",
            )
    rows = [["dense", *figures(results[METHODS[0]]["baseline"], spec, {}), "–", "–"]]
    for method, found in results.items():
        close = found["comparison"]["perplexity"][spec]
        tests = found["comparison"]["tasks"]
        rows.append([f"{method} 2:4", *figures(found, spec, tests), f"{close['kl']:.4f}", f"{close['top1']:.1%}"])
    heads = [
        "tales-llama",
        "perplexity",
        *(f"{task}, {metric}" for task, metric in TASKS.items()),
        "KL",
        "same top token",
    ]
    note = (
        "\nCalibration: 64 sequences of 256 tokens, seed 0, schedule `layer`. Zero-shot, the first "
        f"{limit} rows of each task; perplexity on {WINDOWS} windows of 256 tokens of the evaluation text; float32. "
        " ± is lm-eval's standard error, p the paired test against dense (exact McNemar; for "
        "LAMBADA the paired t test on log likelihoods). The model is tiny and near chance on PIQA.\n"
    )
    # names without this machine's folders
    results = json.loads(json.dumps(results).replace(str(record.SHARED), "../shared"))
    for method, found in results.items():
        found["model"] = method
    record.save(
        "tasks", {"environment": record.environment("lm_eval"), "results": results}, record.table(heads, rows) + note
    )


def figures(found: dict[str, Any], spec: str, tests: dict[str, Any]) -> list[str]:
    cells = [f"{found['perplexity'][spec]['ppl']:.3f}"]
    for task, metric in TASKS.items():
        row = found["tasks"][task]
        error = row["stderr"][metric]
        p = tests.get(task, {}).get(metric, {}).get("p")
        cells.append(f"{row[metric]:.4g} ± {error:.2g}" + ("" if p is None else f" (p {p:.2g})"))
    return cells


if __name__ == "__main__":
    main()
