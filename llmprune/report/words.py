"""What a recipe asked for, in a word or two, for tables, pages and cards."""

from __future__ import annotations

from typing import Any


def steps(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The recipes of a run, one a stage."""
    return [stage["recipe"] for stage in report["stages"]] if "stages" in report else [report["recipe"]]


def methods(report: dict[str, Any]) -> str:
    """The methods of a run in their order, recoveries included."""
    names = [recipe["method"] for recipe in steps(report)]
    names += [entry["recipe"]["how"] for entry in report.get("recovery", [])]
    return ", ".join(names)


def amounts(report: dict[str, Any]) -> str:
    """The amounts of a run in their order."""
    return ", ".join(amount(recipe) for recipe in steps(report))


def amount(recipe: dict[str, Any]) -> str:
    """How much a recipe of one stage takes away."""
    if recipe.get("drop_layers") is not None:
        asked = recipe["drop_layers"]
        if isinstance(asked, list):
            return f"layers {' '.join(map(str, asked))}"
        return f"{asked} layer{'s' if asked > 1 else ''}"
    if recipe.get("drop_experts") is not None:
        return f"{recipe['drop_experts']:.0%} of the experts"
    if recipe["pattern"] != "unstructured":
        return str(recipe["pattern"])
    return "–" if recipe["sparsity"] is None else f"{recipe['sparsity']:.4g}"
