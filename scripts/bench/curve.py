"""What more calibration text is worth, and what text of another kind costs.

Perplexity on the model's evaluation text after calibration on 16 ... 512 sequences of its own calibration text, and on
the largest of these counts of text of the other kind.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import quality
import record

COUNTS = (16, 32, 64, 128, 256, 512)
METHODS = ("wanda", "sparsegpt", "auto-fast", "auto")
OTHER = {"tales-llama": "mix-qwen3", "mix-qwen3": "tales-llama", "tales-qwen3moe": "mix-qwen3"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["tales-llama", "mix-qwen3"])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--amount", default="2:4", choices=list(quality.AMOUNTS))
    parser.add_argument("--counts", nargs="*", type=int, default=list(COUNTS))
    arguments = parser.parse_args()
    amount, most = quality.AMOUNTS[arguments.amount], max(arguments.counts)
    found: list[dict[str, Any]] = []
    for name in arguments.models:
        model, text = record.SHARED / "models" / name, quality.text_of(name)
        dense = quality.perplexity(model, text.evaluation)["ppl"]
        foreign = text._replace(calibration=quality.text_of(OTHER[name]).calibration)
        for method in arguments.methods:
            own = {count: ppl(model, text, amount, count, method) for count in arguments.counts}
            other = ppl(model, foreign, amount, most, method)
            found.append({"model": name, "dense": dense, "method": method, "own": own, "other": other})
            print(found[-1], flush=True)
            save(arguments, found)


def ppl(model: Path, text: quality.Text, amount: dict[str, Any], samples: int, method: str) -> float:
    return float(quality.one(model, text, amount, samples=samples, method=method)["ppl"])


def save(arguments: argparse.Namespace, found: list[dict[str, Any]]) -> None:
    heads = ["model", "method", *map(str, arguments.counts), f"{max(arguments.counts)} of other text"]
    rows = [
        [f"{row['model']} (dense {row['dense']:.3f})", row["method"]]
        + [f"{ppl:.3f}" for ppl in (*row["own"].values(), row["other"])]
        for row in found
    ]
    note = (
        f"\nPerplexity at {arguments.amount}, at most {quality.WINDOWS} windows of 256 tokens of the evaluation text, "
        "float32, after calibration on so many sequences of 256 tokens, seed 0. Other text: for the tales models web "
        "text, for mix-qwen3 tales.\n"
    )
    saved = {"environment": record.environment(), "protocol": note.strip(), "results": found}
    record.save("curve", saved, record.table(heads, rows) + note, echo=False)


if __name__ == "__main__":
    main()
