"""How much of SparseGPT's loss `auto` wins back, and in what time.

Closed share of the gap: (SparseGPT - method) / (SparseGPT - dense) in perplexity on the evaluation text, which no
choice in the method was made on; choices are made with `--held-out`, on the last 15 % of the calibration text. Runs of one seed follow each other, SparseGPT first; times are of whole runs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import quality
import record

import llmprune

MODELS = ("tales-llama", "mix-qwen3", "tales-qwen3moe")
METHODS = ("sparsegpt", "auto-fast", "auto")
AMOUNTS = {key: quality.AMOUNTS[key] for key in ("50 %", "2:4", "70 %")}


def one(
    model: Path, text: quality.Text, method: str, amount: dict[str, Any], samples: int, seed: int
) -> tuple[float, float]:
    """Perplexity of the pruned model, and the seconds of the run."""
    with tempfile.TemporaryDirectory() as folder:
        result = llmprune.prune(
            model,
            out=Path(folder) / "out",
            method=method,
            calibration=text.calibration,
            samples=samples,
            seqlen=256,
            seed=seed,
            **amount,
        )
        return quality.perplexity(Path(folder) / "out", text.evaluation)["ppl"], result.report["run"]["seconds"]


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
    rows, kept = [], []
    for name in arguments.models:
        model, text = record.SHARED / "models" / name, quality.text_of(name, arguments.held_out)
        dense = quality.perplexity(model, text.evaluation)["ppl"]
        for label in arguments.amounts:
            runs = [
                {
                    method: one(model, text, method, AMOUNTS[label], arguments.samples, seed)
                    for method in arguments.methods
                }
                for seed in arguments.seeds
            ]
            kept.append({"model": name, "amount": label, "dense": dense, "runs": runs})
            for method in arguments.methods:
                reference = [run[arguments.methods[0]] for run in runs]
                closed = [
                    (base - run[method][0]) / (base - dense) for run, (base, _) in zip(runs, reference, strict=True)
                ]
                ratios = [run[method][1] / seconds for run, (_, seconds) in zip(runs, reference, strict=True)]
                rows.append(
                    [
                        f"{name} (dense {dense:.3f})",
                        label,
                        method,
                        _spread([run[method][0] for run in runs], ".3f"),
                        _spread([100 * share for share in closed], ".1f") + " %",
                        _spread([run[method][1] for run in runs], ".1f") + " s",
                        _spread(ratios, ".1f") + " ×",
                    ]
                )
                print(*rows[-1], flush=True)
    note = (
        f"\nCalibration: {arguments.samples} x 256 tokens of the model's calibration text, seeds {arguments.seeds}"
        f"{' (mean ± sd)' if len(arguments.seeds) > 1 else ''}. Evaluation: at most {quality.WINDOWS} windows of 256 "
        f"tokens of {'the last 15 % of that text, which are left out of it' if arguments.held_out else 'its evaluation text'}, "
        f"float32. Time × is that of our own {arguments.methods[0]} in the same run of this script.\n"
    )
    table = record.table(["model", "amount", "method", "perplexity", "gap closed", "time", "time ×"], rows)
    record.save(
        arguments.name, {"environment": record.environment(), "protocol": note.strip(), "results": kept}, table + note
    )


def _spread(values: list[float], form: str) -> str:
    mean = f"{statistics.mean(values):{form}}"
    return f"{mean} ± {statistics.stdev(values):{form}}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
