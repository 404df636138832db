"""Perplexity of weight methods, permutation and allocations that are not in `family`: recipe x amount, on one model.

Text and windows are those of `quality.py`; with `--held-out`, so is the text on which choices are made. Recipes that are
measured already, by the same command but for `--recipes`, are taken over from the record.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import quality
import record

RECIPES: dict[str, dict[str, Any]] = {
    "sparsegpt": {"method": "sparsegpt"},
    "sds": {"method": "sds"},
    "fisher, uniform": {"method": "fisher", "allocation": "uniform"},
    "obert": {"method": "obert"},
    "chita": {"method": "chita"},
    "synflow": {"method": "synflow"},
    "ria": {"method": "ria"},
    "ria, permuted": {"method": "ria", "permute": True},
    "sparsegpt, permuted": {"method": "sparsegpt", "permute": True},
    "sparsegpt, owl": {"method": "sparsegpt", "allocation": "owl"},
    "sparsegpt, dynamic": {"method": "sparsegpt", "allocation": "dynamic"},
    "sparsegpt, evopress": {"method": "sparsegpt", "allocation": "evopress"},
    "losparse (dense)": {"method": "losparse"},
}
AMOUNTS = ("50 %", "2:4", "70 %")


def means(recipe: dict[str, Any], amount: str) -> bool:
    """Whether a recipe has a meaning at an amount."""
    if amount == "2:4":
        return recipe.get("allocation") in (None, "uniform") and recipe["method"] != "losparse"
    return "permute" not in recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tales-llama")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--held-out", type=Path, metavar="FOLDER", help="where the parts of the calibration text go")
    parser.add_argument("--name", default="weight", help="of the record under benchmarks/")
    arguments = parser.parse_args()
    model, text = record.SHARED / "models" / arguments.model, quality.text_of(arguments.model, arguments.held_out)
    path = record.FOLDER / f"{arguments.name}.json"
    results: dict[str, Any] = json.loads(path.read_text())["results"] if path.is_file() else {}
    results.setdefault("dense", quality.perplexity(model, text.evaluation))
    for label in arguments.recipes:
        for amount in AMOUNTS:
            key = f"{label} {amount}"
            if means(RECIPES[label], amount) and key not in results:
                results[key] = quality.one(model, text, quality.AMOUNTS[amount], **RECIPES[label])
                print(key, round(results[key]["ppl"], 3), results[key]["seconds"], flush=True)
                save(arguments, results)


def save(arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    rows = [
        [
            label,
            *(f"{results[key]['ppl']:.3f}" if (key := f"{label} {amount}") in results else "" for amount in AMOUNTS),
        ]
        for label in RECIPES
        if any(f"{label} {amount}" in results for amount in AMOUNTS)
    ]
    where = (
        "the last 15 % of the calibration text, which did not calibrate" if arguments.held_out else "evaluation text"
    )
    note = (
        f"\nPerplexity of {arguments.model} (dense {results['dense']['ppl']:.3f}), at most {quality.WINDOWS} windows of 256 "
        f"tokens of the {where}, float32; calibration on 64 x 256 tokens, seed 0. The times in the JSON were taken beside "
        "other work.\n"
    )
    content = {"environment": record.environment(), "protocol": note.strip(), "results": results}
    record.save(arguments.name, content, record.table(["recipe", *AMOUNTS], rows) + note)


if __name__ == "__main__":
    main()
