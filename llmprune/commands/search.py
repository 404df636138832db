"""`llmprune search`: how much a model can lose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from llmprune.commands import AsJson, Device, Dtype, Quiet, Seed, Settings, Trust, read_settings

# Arguments of the call that are no part of a recipe.
NO_SETTINGS = ("model", "out", "recipe", "reporter")


def search(
    model: Annotated[str | None, typer.Argument(help="Model folder, or Hub id (@REVISION allowed).")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the result and the finished points.")] = Path("search"),
    methods: Annotated[str | None, typer.Option(help="Methods, comma list.")] = None,
    amounts: Annotated[
        str | None, typer.Option(help="Comma list: fractions, patterns (2:4), numbers of layers.")
    ] = None,
    perplexity: Annotated[str | None, typer.Option(help="SPEC of the text that decides.")] = None,
    sweep: Annotated[
        bool | None, typer.Option("--sweep/--no-sweep", help="Every method with every amount (the default).")
    ] = None,
    scan: Annotated[bool | None, typer.Option("--scan", help="Each layer alone, for every method and amount.")] = None,
    budget: Annotated[
        str | None, typer.Option(help="Find the smallest model with ppl<=1.05x (times dense) or ppl<=15.2.")
    ] = None,
    latency: Annotated[bool | None, typer.Option("--latency", help="Time every model of the sweep.")] = None,
    max_windows: Annotated[int | None, typer.Option(help="Measure only the first windows of the text.")] = None,
    calibration: Annotated[str | None, typer.Option(help="Text SPEC for calibration.")] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration sequences.")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens a sequence, and a window of perplexity.")] = None,
    settings: Settings = None,
    recipe: Annotated[Path | None, typer.Option(help="File with the sections prune and search.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = None,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Try methods and amounts on MODEL. What is measured is kept in --out, so the same command goes on."""
    import llmprune
    from llmprune.progress import Reporter
    from llmprune.report.searched import budget_sentences, scan_table, sweep_table

    given: dict[str, Any] = {
        "methods": methods,
        "amounts": amounts,
        "perplexity": perplexity,
        "sweep": sweep,
        "scan": scan,
        "budget": budget,
        "latency": latency,
        "max_windows": max_windows,
        "calibration": calibration,
        "samples": samples,
        "seqlen": seqlen,
        "device": device,
        "dtype": dtype,
        "seed": seed,
        "trust_remote_code": trust_remote_code or None,
    }
    given |= read_settings(settings, NO_SETTINGS)
    found = llmprune.search(model, out=out, recipe=recipe, reporter=Reporter(quiet=quiet), **given)
    if as_json:
        print(json.dumps(found))
        return
    for heads, rows in (sweep_table(found), scan_table(found)):
        if rows:
            table = Table(*heads)
            for row in rows:
                table.add_row(*row)
            Console().print(table)
    for sentence in budget_sentences(found):
        print(sentence)
    print(f"{out}: search.json; llmprune report {out} draws it")
