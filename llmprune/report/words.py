"""What a recipe asked for, in a word or two, for tables, pages and cards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmprune import texts


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


def calibrations(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What each stage says of its calibration text, with its method and seed; a stage without text says nothing."""
    return [
        {**stage["calibration"], "method": stage["recipe"]["method"], "seed": stage["recipe"]["seed"]}
        for stage in report.get("stages", [report])
        if stage.get("calibration")
    ]


def flattering(report: dict[str, Any]) -> list[str]:
    """Warnings of perplexities on a text that the model was pruned or recovered with."""
    used = [("calibration", one["source"]) for one in calibrations(report)]
    used += [("recovery", entry["data"]["source"]) for entry in report.get("recovery", [])]
    found = [
        f"{what} and evaluation text are the same ({short(spec)}): the perplexity flatters"
        for spec in report.get("evaluation", {}).get("perplexity", {})
        for what, source in used
        if texts.same(source, spec)
    ]
    return list(dict.fromkeys(found))


def short(spec: str) -> str:
    """A text SPEC without folders."""
    kind, colon, rest = spec.partition(":")
    return Path(rest).name if kind == "file" and colon else spec


def takes_24(report: dict[str, Any]) -> bool:
    """Whether a run leaves matrices with 2:4 zeros, which the packed kernels take."""
    found = False
    for stage in report.get("stages", [report]):
        recipe = stage["recipe"]
        if stage.get("structure", {}).get("kind") == "width":
            # columns that go leave other groups of four
            found = False
        found = found or "2:4" in (recipe["pattern"], *(one["pattern"] for one in recipe.get("overrides", [])))
    return found


def amount(recipe: dict[str, Any]) -> str:
    """How much a recipe of one stage takes away."""
    if recipe.get("drop_layers") is not None:
        asked = recipe["drop_layers"]
        if isinstance(asked, list):
            return f"layers {' '.join(map(str, asked))}"
        return f"{asked} layer{'s' if asked > 1 else ''}"
    if recipe.get("drop_experts") is not None:
        return f"{recipe['drop_experts']:.0%} of the experts"
    if recipe.get("ratio") is not None:
        return f"{recipe['ratio']:.0%} of the layers' parameters"
    if recipe.get("params") is not None:
        return f"down to {recipe['params']:.3g} parameters"
    if recipe["pattern"] != "unstructured":
        return str(recipe["pattern"])
    return "–" if recipe["sparsity"] is None else f"{recipe['sparsity']:.4g}"
