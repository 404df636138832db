"""What a recipe asked for and how something was measured, in a word or two, for tables, pages and cards."""

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


def windows(row: dict[str, Any]) -> str:
    """The protocol of a perplexity but for text and dtype: figures with other words cannot be compared."""
    apart = "" if row["stride"] == row["seqlen"] else f", stride {row['stride']}"
    begun = {"window": "BOS in each", "text": "BOS before the text", "never": "no BOS"}[row["bos_at"]]
    return f"{row['windows']} windows of {row['seqlen']}{apart}, {begun}"


def prompts(row: dict[str, Any]) -> str:
    """The protocol of a task but for dtype: figures with other words cannot be compared."""
    said = [] if row["fewshot"] is None else [f"{row['fewshot']}-shot"]
    said += [] if row["n"] is None else [f"{row['n']:,} rows"]
    said += ["chat template"] if row["chat_template"] else []
    said += [f"seed {row['seed']}"] if row["fewshot"] else []
    return ", ".join(said)


def difference(test: dict[str, Any]) -> str:
    """How much more a pruned model has of a metric than the dense one, on the same rows (see `eval.significance`)."""
    spread = "" if test["stderr"] is None else f" ± {test['stderr']:.2g}"
    return f"{test['delta']:+.3g}{spread}" + (f" ({test['of']})" if "of" in test else "")


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
