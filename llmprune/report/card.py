"""The model card of a run: our part of it, which every push renews, and what people wrote around it, which stays."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader

from llmprune.checkpoint.adapter import FOLDER
from llmprune.report import words

CARD = "README.md"
BEGIN, END = "<!-- llmprune: begin, rewritten at every push -->", "<!-- llmprune: end -->"
# Marks the results that a push may replace; those of other sources stay.
SOURCE = "llmprune"


def model_card(
    folder: Path,
    report: dict[str, Any],
    repo_id: str,
    *,
    existing: str | None = None,
    dense: str | None = None,
    base: str | None = None,
    license: str | None = None,
) -> ModelCard:
    """The card of a run in `folder`: new, or the text of the `existing` one with our part of it renewed.

    `dense`: the text of the dense model's card, whose licence is inherited unless `license` is given or the existing
    card names one. `base`: the dense model's Hub id.
    """
    results = list(_results(repo_id, report.get("evaluation", {})))
    parts = Environment(loader=PackageLoader("llmprune.report", "."), trim_blocks=True, lstrip_blocks=True)
    block = parts.get_template("card_block.md").render(
        report=report, steps=words.steps(report), amount=words.amount, base=base, repo=repo_id, begin=BEGIN, end=END,
        results=[row for row, _ in results], calibrations=words.calibrations(report), without_folder=_without_folder,
        warnings=[*report.get("warnings", []), *words.flattering(report)], own_code=_brings_code(folder),
        sparse=words.takes_24(report), adapter=FOLDER if (folder / FOLDER).is_dir() else None,
    )  # fmt: skip
    card = None if existing is None else ModelCard(existing, ignore_metadata_errors=True)
    data: Any = ModelCardData() if card is None else card.data
    _update(data, base, report)
    _license(data, license, dense)
    kept = [one for one in data.eval_results or [] if one.source_name != SOURCE]
    data.eval_results = kept + [one for _, one in results] or None
    name = repo_id.rpartition("/")[2]
    if data.eval_results:
        data.model_name = data.model_name or name
    if card is None:
        text = parts.get_template("card.md").render(card_data=data.to_yaml(), name=name, block=block)
        return ModelCard(text + "\n")
    before, found, rest = card.text.partition(BEGIN)
    after = rest.partition(END)[2] if found else ""
    # a card without our part gets it at the end
    card.text = before + block + after if found else f"{before.rstrip()}\n\n{block}\n"
    return card


def _brings_code(folder: Path) -> bool:
    """Whether the model's class, or that of its configuration, lies in the folder and not in transformers."""
    return "auto_map" in json.loads((folder / "config.json").read_text()) and any(folder.glob("*.py"))


def _update(data: Any, base: str | None, report: dict[str, Any]) -> None:
    """Our metadata, where nobody has written other; tags are added to those that are there."""
    data.base_model = data.base_model or base
    data.library_name = data.library_name or "transformers"
    data.pipeline_tag = data.pipeline_tag or "text-generation"
    steps = words.steps(report)
    ours = ["llmprune", "pruned", *(recipe["method"] for recipe in steps)]
    ours += [f"{recipe['pattern']}-sparsity" for recipe in steps if recipe["pattern"] != "unstructured"]
    data.tags = list(dict.fromkeys([*(data.tags or []), *ours]))


def _license(data: Any, asked: str | None, dense: str | None) -> None:
    """The licence that is asked for, else the card's own, else the dense model's, with its name and link."""
    found = data
    if asked is not None and asked != data.license:
        found = ModelCardData(license=asked)
    elif data.license is None and dense is not None:
        found = ModelCard(dense, ignore_metadata_errors=True).data
    for key in ("license", "license_name", "license_link"):
        setattr(data, key, getattr(found, key, None))


def _results(repo_id: str, evaluation: dict[str, Any]) -> Iterator[tuple[dict[str, str], EvalResult]]:
    """Rows of the card's table, each with the entry for the metadata."""
    dense = evaluation.get("baseline", {})
    for spec, row in evaluation.get("perplexity", {}).items():
        name = _without_folder(spec)
        protocol = f"{row['tokens']:,} tokens, {words.windows(row)}, {row['dtype']}"
        other = dense.get("perplexity", {}).get(spec)
        table = {
            "what": f"perplexity, {name}",
            "value": f"{row['ppl']:.3f}",
            "dense": f"{other['ppl']:.3f}" if other else "–",
        }
        yield {**table, "protocol": protocol}, _entry(repo_id, name, "perplexity", row["ppl"], protocol)
    for name, row in evaluation.get("tasks", {}).items():
        protocol = f"lm-eval, {words.prompts(row)}, {row['dtype']}"
        for metric, error in row["stderr"].items():
            if not isinstance(row.get(metric), float):
                continue
            spread = f" ± {error:.4f}" if error is not None else ""
            other = dense.get("tasks", {}).get(name)
            table = {
                "what": f"{metric}, {name}",
                "value": f"{row[metric]:.4f}{spread}",
                "dense": f"{other[metric]:.4f}" if other else "–",
            }
            yield {**table, "protocol": protocol}, _entry(repo_id, name, metric, row[metric], protocol)


def _entry(repo_id: str, dataset: str, metric: str, value: float, protocol: str) -> EvalResult:
    return EvalResult(
        task_type="text-generation", dataset_type=dataset, dataset_name=dataset, metric_type=metric,
        metric_value=value, metric_name=f"{metric} ({protocol})", source_name=SOURCE,
        source_url=f"https://huggingface.co/{repo_id}",
    )  # fmt: skip


def _without_folder(spec: str) -> str:
    """A text SPEC without the folders of this machine."""
    kind, colon, rest = spec.partition(":")
    return f"{kind}:{Path(rest).name}" if kind == "file" and colon else spec
