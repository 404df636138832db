"""Perplexity of weight methods on the small real models: model x method x amount.

Calibration: 64 sequences of 256 tokens of the text that belongs to each model, seed 0. Evaluation:
windows of 256 tokens laid end to end over the model's evaluation text, float32. With `--held-out` the last 15 % of the
calibration text are evaluated on and the rest calibrates: the text on which choices are made.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import record

import llmprune

MODELS = {
    "stories260K": "stories",
    "babyllama-tok105": "stories",
    "tales-llama": "tales",
    "mix-qwen3": "web",
    "tales-qwen3moe": "tales",
}
METHODS = ("magnitude", "wanda", "sparsegpt")
AMOUNTS: dict[str, dict[str, Any]] = {
    "50 %": {"sparsity": 0.5},
    "60 %": {"sparsity": 0.6},
    "2:4": {"pattern": "2:4"},
    "4:8": {"pattern": "4:8"},
    "70 %": {"sparsity": 0.7},
}
WINDOWS = 120
HELD_OUT = 0.15


class Text(NamedTuple):
    """SPECs of the text to calibrate with and of the text to evaluate on."""

    calibration: str
    evaluation: str


def text_of(model: str, held_out: Path | None = None) -> Text:
    """The two texts of a model; with a folder for the parts, both from its calibration text."""
    name = MODELS[model]
    whole, other = (record.SHARED / "data" / f"{name}-{use}.txt" for use in ("calibration", "eval"))
    if held_out is None:
        return Text(f"file:{whole}", f"file:{other}")
    lines = whole.read_text().splitlines(keepends=True)
    first = len(lines) - round(HELD_OUT * len(lines))
    parts = [held_out / f"{name}-{use}.txt" for use in ("rest", "held-out")]
    for part, its_lines in zip(parts, (lines[:first], lines[first:]), strict=True):
        part.write_text("".join(its_lines))
    return Text(*(f"file:{part}" for part in parts))


def perplexity(model: Path, spec: str, windows: int = WINDOWS) -> dict[str, Any]:
    measured: dict[str, Any] = llmprune.evaluate(
        model, perplexity=spec, seqlen=256, max_windows=windows, dtype="float32"
    )["perplexity"][spec]
    return measured


def misfit(model: Path, amount: dict[str, Any]) -> list[str]:
    """Matrices that a pattern does not divide are left dense, and named in the record."""
    group = int(amount["pattern"].split(":")[1]) if "pattern" in amount else 1
    plan = llmprune.prune(model, method="magnitude", sparsity=0.5, dry_run=True).report
    return [row["name"] for row in plan["tensors"] if row["shape"][1] % group]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--schedule", default="auto")
    parser.add_argument("--held-out", type=Path, metavar="FOLDER", help="where the parts of the calibration text go")
    parser.add_argument("--name", default="quality", help="of the record under benchmarks/")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for name in arguments.models:
        model, text = record.SHARED / "models" / name, text_of(name, arguments.held_out)
        found = results[name] = {"text": text, "dense": perplexity(model, text.evaluation)}
        for method in arguments.methods:
            for label, amount in AMOUNTS.items():
                key = f"{method} {label}"
                found[key] = one(model, text, amount, method=method, schedule=arguments.schedule)
                print(name, key, f"{found[key]['ppl']:.3f}", flush=True)
                save(arguments, results)


def save(arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    rows = [
        [
            f"{name} (dense {found['dense']['ppl']:.3f})",
            method,
            *(_cell(found.get(f"{method} {label}")) for label in AMOUNTS),
        ]
        for name, found in results.items()
        for method in arguments.methods
    ]
    note = (
        f"\nPerplexity, at most {WINDOWS} windows of 256 tokens of the evaluation text, float32; calibration on 64 x 256 "
        f"tokens of the model's calibration text, seed 0, schedule `{arguments.schedule}`. BOS where the tokenizer adds it.\n"
        "gpt-nano-sort is no language model and has no text; it is not in the table.\n"
        "* down_proj left dense: the pattern does not divide its inputs.\n"
    )
    saved = {"environment": record.environment(), "protocol": note.strip(), "results": results}
    record.save(arguments.name, saved, record.table(["model", "method", *AMOUNTS], rows) + note, echo=False)


def _cell(one: dict[str, Any] | None) -> str:
    if one is None:
        return "–"
    return f"{one['ppl']:.3f}{'*' if one['left_dense'] else ''}"


def one(model: Path, text: Text, amount: dict[str, Any], samples: int = 64, **settings: Any) -> dict[str, Any]:
    """Prune and measure; `settings` are recipe keys."""
    ignore = misfit(model, amount)
    with tempfile.TemporaryDirectory() as folder:
        result = llmprune.prune(
            model,
            out=Path(folder) / "out",
            calibration=text.calibration,
            samples=samples,
            seqlen=256,
            ignore=ignore,
            **amount,
            **settings,
        )
        measured = perplexity(Path(folder) / "out", text.evaluation)
    return {**measured, "seconds": result.report["run"]["seconds"], "left_dense": ignore}


if __name__ == "__main__":
    main()
