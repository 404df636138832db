"""`llmprune run`: one recipe file from the dense model to the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from llmprune.commands import AsJson, Quiet, Settings, read_settings

# Arguments of the call that are no part of a recipe.
NO_SETTINGS = ("recipe", "out", "overwrite", "reporter", "settings")


def run(
    recipe: Annotated[Path, typer.Argument(help="YAML file with the sections prune, recover, eval, report, push.")],
    out: Annotated[Path, typer.Option(help="Folder for the models, the report and the journal.")],
    settings: Settings = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace models that were made with other settings.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Do what RECIPE says, step by step. A step that is done is not repeated: the same command goes on."""
    from llmprune import workflow
    from llmprune.progress import Reporter

    result = workflow.run(
        recipe,
        out=out,
        overwrite=overwrite,
        reporter=Reporter(quiet=quiet),
        settings=read_settings(settings, NO_SETTINGS),
    )
    if as_json:
        print(json.dumps(result.report))
        return
    measured = result.report.get("evaluation", {})
    for text, row in measured.get("perplexity", {}).items():
        dense = measured["baseline"]["perplexity"][text]["ppl"]
        print(f"perplexity on {text}: {row['ppl']:.3f} (dense {dense:.3f})")
    print(f"{result.folder}: the model")
    if (out / "report.html").is_file():
        print(f"{out / 'report.html'}: the report")
