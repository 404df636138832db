"""The weight family: perplexity of every method, and of what goes around one, by model, amount, seed and calibration size.

Text and windows are those of `quality.py`; with `--held-out`, so is the text on which choices are made. Every figure is
saved as it is measured and not measured again; after `--minutes` the script ends, to go on at the next call.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import quality
import record

from llmprune.types import UserError

MODELS = ("tales-llama", "mix-qwen3", "tales-qwen3moe")


class Entry(NamedTuple):
    """A recipe, the amounts that have a meaning with it, and whether a seed changes anything."""

    recipe: dict[str, Any]
    amounts: tuple[str, ...] = tuple(quality.AMOUNTS)
    seeded: bool = True


SPREAD = ("50 %", "60 %", "70 %")  # an N:M pattern leaves an allocation nothing to spread
PATTERNS = ("2:4", "4:8")
METHODS = {
    **{name: Entry({"method": name}, seeded=False) for name in ("magnitude", "synflow")},
    **{
        name: Entry({"method": name})
        for name in (
            *("random", "activation", "wanda", "wanda-adaptive", "ria", "dsnot", "gblm", "pruner-zero", "wanda++"),
            *("fisher", "taylor", "qm", "grasp", "sparsegpt", "thanos", "admm", "alps", "sds", "sparsellm", "obert"),
            *("chita", "k-fac", "llm-surgeon", "obc", "auto-fast", "auto"),
        )
    },
    "besa": Entry({"method": "besa"}, SPREAD),
    "losparse (sum, dense)": Entry({"method": "losparse"}, SPREAD, seeded=False),
}
AROUND = {
    "sparsegpt, order=rose": Entry({"method": "sparsegpt", "options": {"order": "rose"}}),
    "sparsegpt, steps=4": Entry({"method": "sparsegpt", "steps": 4}),
    "sparsegpt, retarget=1": Entry({"method": "sparsegpt", "retarget": 1.0}),
    "wanda, update=sparsegpt": Entry({"method": "wanda", "update": "sparsegpt"}),
    "wanda, update=least-squares": Entry({"method": "wanda", "update": "least-squares"}),
    "wanda, refine=swaps": Entry({"method": "wanda", "refine": "swaps"}),
    "wanda, reconstruct=8": Entry({"method": "wanda", "reconstruct": 8}),
    "admm, refine=swaps, update=least-squares": Entry({"method": "admm", "refine": "swaps", "update": "least-squares"}),
    **{
        f"sparsegpt, {name}": Entry({"method": "sparsegpt", "allocation": name}, SPREAD)
        for name in ("owl", "alphapruning", "arithmetic", "dlp", "error", "dynamic", "evopress")
    },
    **{
        f"{name}, permute": Entry({"method": name, "permute": True}, PATTERNS) for name in ("wanda", "ria", "sparsegpt")
    },
}
ENTRIES = {**METHODS, **AROUND}


class Cell(NamedTuple):
    """What one figure belongs to."""

    model: str
    samples: int
    label: str
    amount: str
    seed: int

    @property
    def key(self) -> str:
        return f"{self.label} | {self.amount} | {self.samples} | {self.seed}"


def cells(arguments: argparse.Namespace) -> Iterator[Cell]:
    """Seed by seed, so that an unfinished record is whole for the first ones."""
    for samples, seed in itertools.product(arguments.samples, arguments.seeds):
        for model, label in itertools.product(arguments.models, arguments.recipes):
            entry = ENTRIES[label]
            if seed == arguments.seeds[0] or entry.seeded:
                for amount in arguments.amounts:
                    if amount in entry.amounts:
                        yield Cell(model, samples, label, amount, seed)


def measured(cell: Cell, text: quality.Text) -> dict[str, Any]:
    """One figure; what a method refuses is kept as its reason."""
    model, settings = record.SHARED / "models" / cell.model, ENTRIES[cell.label].recipe
    try:
        return quality.one(model, text, quality.AMOUNTS[cell.amount], samples=cell.samples, seed=cell.seed, **settings)
    except UserError as refused:
        return {"refused": str(refused)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--recipes", nargs="*", default=list(ENTRIES), choices=list(ENTRIES), metavar="RECIPE")
    parser.add_argument("--amounts", nargs="*", default=list(quality.AMOUNTS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, nargs="*", default=[64])
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--held-out", type=Path, metavar="FOLDER", help="where the parts of the calibration text go")
    parser.add_argument("--name", default="family", help="of the record under benchmarks/")
    arguments = parser.parse_args()
    saved: dict[str, Any] = {"results": {}, **record.load(arguments.name)}
    record.enter(saved)
    ends = time.monotonic() + 60 * arguments.minutes
    for cell in cells(arguments):
        text = quality.text_of(cell.model, arguments.held_out)
        found = saved["results"].setdefault(cell.model, {})
        if "dense" not in found:
            found["dense"] = quality.perplexity(record.SHARED / "models" / cell.model, text.evaluation)
        if cell.key in found:
            continue
        if time.monotonic() > ends:
            print("to be continued")
            break
        found[cell.key] = measured(cell, text)
        print(cell.model, cell.key, found[cell.key].get("ppl", "refused"), found[cell.key].get("seconds"), flush=True)
        save(arguments, saved)
    save(arguments, saved)


def save(arguments: argparse.Namespace, saved: dict[str, Any]) -> None:
    where = (
        "the last 15 % of the calibration text, which did not calibrate"
        if arguments.held_out
        else "the evaluation text"
    )
    saved["protocol"] = (
        f"Perplexity on at most {quality.WINDOWS} windows of 256 tokens of {where}, float32; calibration on so many "
        "sequences of 256 tokens of the model's calibration text. Mean ± standard deviation over seeds, with their number "
        "where it is not 3; one figure where the seed changes nothing. –: not measured, or (in the amounts of a pattern) "
        "without meaning. Times in the JSON were taken beside other work."
    )
    text = ""
    for model, found in saved["results"].items():
        for samples in sorted({int(key.split(" | ")[2]) for key in found if key != "dense"}):
            rows = list(_rows(found, samples))
            text += f"## {model}, {samples} x 256 tokens\n\nDense: {found['dense']['ppl']:.3f}.\n\n"
            text += record.table(["recipe", *quality.AMOUNTS], rows) + "\n"
        reasons = {
            (key.split(" | ")[0], one["refused"]) for key, one in found.items() if key != "dense" and "refused" in one
        }
        text += "".join(f"`{label}` is refused: {reason}\n\n" for label, reason in sorted(reasons))
    record.save(arguments.name, saved, saved["protocol"] + "\n\n" + text, echo=False)


def _rows(found: dict[str, Any], samples: int) -> Iterator[list[str]]:
    for label, entry in ENTRIES.items():
        row = []
        for amount in quality.AMOUNTS:
            start = f"{label} | {amount} | {samples} | "
            values = [one["ppl"] for key, one in found.items() if key.startswith(start) and "ppl" in one]
            row.append(_spread(values, entry.seeded))
        if any(cell != "–" for cell in row):
            yield [label, *row]


def _spread(values: list[float], seeded: bool) -> str:
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.3f}" + (" (1)" if seeded else "")
    count = "" if len(values) == 3 else f" ({len(values)})"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}{count}"


if __name__ == "__main__":
    main()
