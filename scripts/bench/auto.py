"""How much of SparseGPT's loss `auto` wins back, and in what time.

Closed share of the gap: (SparseGPT - method) / (SparseGPT - dense) in perplexity on the evaluation text, which no
choice in the method was made on; choices are made with `--held-out`, on the last 15 % of the calibration text. Runs of one seed follow each other, SparseGPT first; times are of whole runs.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path
from typing import Any

import quality
import record

MODELS = ("tales-llama", "mix-qwen3", "tales-qwen3moe")
METHODS = ("sparsegpt", "auto-fast", "auto")
AMOUNTS = {key: quality.AMOUNTS[key] for key in ("50 %", "2:4", "70 %")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help="the first is what the others are held to")
    parser.add_argument("--amounts", nargs="*", default=list(AMOUNTS))
    parser.add_argument("--held-out", type=Path, metavar="FOLDER", help="where the parts of the calibration text go")
    parser.add_argument("--name", default="auto", help="of the record under benchmarks/")
    arguments = parser.parse_args()
    kept: list[dict[str, Any]] = []
    for name, label in itertools.product(arguments.models, arguments.amounts):
        model, text = record.SHARED / "models" / name, quality.text_of(name, arguments.held_out)
        dense = quality.perplexity(model, text.evaluation)["ppl"]
        kept.append({"model": name, "amount": label, "dense": dense, "runs": []})
        for seed in arguments.seeds:
            run = {}
            for method in arguments.methods:
                found = quality.one(model, text, AMOUNTS[label], samples=arguments.samples, method=method, seed=seed)
                run[method] = (found["ppl"], found["seconds"])
                print(name, label, seed, method, *run[method], flush=True)
            kept[-1]["runs"].append(run)
            save(arguments, kept)


def save(arguments: argparse.Namespace, kept: list[dict[str, Any]]) -> None:
    rows = [_row(one, method, arguments.methods[0]) for one in kept for method in arguments.methods]
    note = (
        f"\nCalibration: {arguments.samples} x 256 tokens of the model's calibration text, seeds {arguments.seeds}"
        f"{' (mean ± sd)' if len(arguments.seeds) > 1 else ''}. Evaluation: at most {quality.WINDOWS} windows of 256 "
        f"tokens of {'the last 15 % of that text, which are left out of it' if arguments.held_out else 'its evaluation text'}, "
        f"float32. Time × is that of our own {arguments.methods[0]} in the same run of this script.\n"
    )
    table = record.table(["model", "amount", "method", "perplexity", "gap closed", "time", "time ×"], rows)
    record.save(
        arguments.name,
        {"environment": record.environment(), "protocol": note.strip(), "results": kept},
        table + note,
        echo=False,
    )


def _row(found: dict[str, Any], method: str, first: str) -> list[str]:
    """A method's perplexities and times, and what they are to those of the first method in the same runs."""
    dense, pairs = found["dense"], [(run[method], run[first]) for run in found["runs"]]
    return [
        f"{found['model']} (dense {dense:.3f})",
        found["amount"],
        method,
        _spread([ppl for (ppl, _), _ in pairs], ".3f"),
        _spread([100 * (base - ppl) / (base - dense) for (ppl, _), (base, _) in pairs], ".1f") + " %",
        _spread([seconds for (_, seconds), _ in pairs], ".1f") + " s",
        _spread([seconds / base for (_, seconds), (_, base) in pairs], ".1f") + " ×",
    ]


def _spread(values: list[float], form: str) -> str:
    mean = f"{statistics.mean(values):{form}}"
    return f"{mean} ± {statistics.stdev(values):{form}}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
