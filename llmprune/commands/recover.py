"""`llmprune recover`: win back what pruning cost, with the same zeros."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from llmprune import ranks
from llmprune.commands import AsJson, Device, Overwrite, Quiet, RecipeFile, Resume, Seed, Settings, Trust, read_settings

# Arguments of `api.recover` that are no part of a recipe.
NO_SETTINGS = ("model", "out", "recipe", "resume", "overwrite", "reporter")


def recover(
    folder: Annotated[str, typer.Argument(help="Folder of the pruned model.")],
    out: Annotated[Path, typer.Option(help="Folder for the recovered model.")],
    how: Annotated[
        str | None,
        typer.Option(
            help="blockwise, finetune, distill, lora, masked, spp, merge-then-mask, gradual, movement, sheared, "
            "compresso, loraprune, lorashear, splora, apt, or a preset."
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(help="SPEC of a text, or of conversations and instructions.")] = None,
    teacher: Annotated[str | None, typer.Option(help="The dense model; the one that was pruned by default.")] = None,
    steps: Annotated[int | None, typer.Option(help="Changes of the weights.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Times through the text, where --steps is not given.")] = None,
    minutes: Annotated[float | None, typer.Option(help="The most it may take.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="At its peak; that of the kind by default.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences a step.")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens a sequence.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Folder for the adapter alone, in PEFT's format.")] = None,
    settings: Settings = None,
    recipe: RecipeFile = None,
    device: Device = None,
    seed: Seed = None,
    trust_remote_code: Trust = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train the pruned model in FOLDER, or fit it layer by layer, and write it to --out with the same zeros."""
    from llmprune import api
    from llmprune.progress import Reporter

    given: dict[str, Any] = {
        "how": how,
        "data": data,
        "teacher": teacher,
        "steps": steps,
        "epochs": epochs,
        "minutes": minutes,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "seqlen": seqlen,
        "adapter": None if adapter is None else str(adapter),
        "device": device,
        "seed": seed,
        "trust_remote_code": trust_remote_code or None,
    }
    given |= read_settings(settings, NO_SETTINGS)
    reporter = Reporter(quiet=quiet)
    result = api.recover(folder, out=out, recipe=recipe, resume=resume, overwrite=overwrite, reporter=reporter, **given)
    if not ranks.leads():
        return
    if as_json:
        print(json.dumps(result.report))
    else:
        print(f"{out}: {_achieved(result.report['recovery'][-1])}; {result.report['verified']}")


def _achieved(entry: dict[str, Any]) -> str:
    seconds = f"{entry['run']['seconds']:.1f} s"
    if "held_out" not in entry:
        before, after = (sum(row[key] for row in entry["fits"]) / len(entry["fits"]) for key in ("before", "after"))
        return f"mean output error of a layer {before:.4f} before, {after:.4f} after; {seconds}"
    found = entry["held_out"]
    lost = ""
    if abs(found["stored"] / found["trained"] - 1) > 1e-3:
        lost = f" ({found['trained']:.3f} before merging)"
    return (
        f"held-out perplexity {found['before']:.3f} before, {found['stored']:.3f} after{lost}; step {entry['best_step']} "
        f"of {entry['steps']} kept; {seconds}"
    )
