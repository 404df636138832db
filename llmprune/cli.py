"""The command line: every command builds a recipe or a call of the Python interface."""

from __future__ import annotations

import json
import sys
from inspect import getdoc
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Column, Table

from llmprune import __version__, interruption, ranks
from llmprune.commands import (
    AsJson,
    Device,
    Dtype,
    Model,
    Overwrite,
    Quiet,
    RecipeFile,
    Resume,
    Seed,
    Settings,
    Trust,
    read_settings,
)
from llmprune.commands.bench import bench
from llmprune.commands.check import check
from llmprune.commands.evaluate import evaluate
from llmprune.commands.push import push
from llmprune.commands.recover import recover
from llmprune.commands.report import report
from llmprune.commands.run import run
from llmprune.commands.search import search
from llmprune.types import RunError, UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
errors = Console(stderr=True, highlight=False)

# Arguments of `api.prune` that are no part of a recipe.
NO_SETTINGS = ("model", "out", "recipe", "tokenizer", "resume", "overwrite", "dry_run", "reporter")
# Commands that several processes can share.
SHARED = ("prune", "recover")
# What to do after a run that broke off, by command.
HINTS = {
    "prune": "\nwhat is finished is kept; run the same command with --resume to go on",
    "recover": "\nwhat is finished is kept; run the same command with --resume to go on",
    "search": "\nwhat is measured is kept; run the same command again to go on",
    "run": "\nwhat is finished is kept; run the same command again to go on",
}

app.command("eval")(evaluate)
app.command()(bench)
app.command()(check)
app.command()(push)
app.command()(recover)
app.command()(report)
app.command()(run)
app.command()(search)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"llmprune {__version__}")
        raise typer.Exit


@app.callback()
def every_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None:
    """Post-training pruning of Hugging Face language models."""


@app.command()
def prune(
    model: Annotated[str | None, typer.Argument(help="Model folder, or Hub id (@REVISION allowed).")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the pruned model.")] = None,
    method: Annotated[str | None, typer.Option(help="Pruning method; see `llmprune methods`.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Fraction of weights set to zero.")] = None,
    pattern: Annotated[str | None, typer.Option(help="KEEP:GROUP along the inputs, for example 2:4.")] = None,
    drop_layers: Annotated[
        str | None, typer.Option(help="Decoder layers to leave out: how many (4), or which (5,6,7).")
    ] = None,
    drop_experts: Annotated[float | None, typer.Option(help="Fraction of every layer's experts to leave out.")] = None,
    layout: Annotated[
        str | None, typer.Option(help="plain, or remote-code: smaller where no plain class holds the result.")
    ] = None,
    ratio: Annotated[
        float | None, typer.Option(help="Share of the decoder layers' parameters to take out, as heads and channels.")
    ] = None,
    params: Annotated[float | None, typer.Option(help="Parameters the model should have, for example 6e9.")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text SPEC: file:PATH[:FIELD], wikitext2, c4, ptb, hub:…, demo.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration sequences.")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens a sequence.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences a batch.")] = None,
    schedule: Annotated[str | None, typer.Option(help="layer (lean) or module (one pass).")] = None,
    allocation: Annotated[str | None, typer.Option(help="How the amount is spread: uniform, global, owl, …")] = None,
    targets: Annotated[str | None, typer.Option(help="Matrices: names, globs, re:REGEX; comma list.")] = None,
    ignore: Annotated[str | None, typer.Option(help="Matrices to leave alone; same form.")] = None,
    settings: Settings = None,
    recipe: RecipeFile = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = None,
    trust_remote_code: Trust = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Prune MODEL and write a plain checkpoint to --out."""
    from llmprune import api
    from llmprune.progress import Reporter

    given: dict[str, Any] = {
        "method": method,
        "sparsity": sparsity,
        "pattern": pattern,
        "drop_layers": drop_layers,
        "drop_experts": drop_experts,
        "layout": layout,
        "ratio": ratio,
        "params": params,
        "calibration": calibration,
        "samples": samples,
        "seqlen": seqlen,
        "batch_size": batch_size,
        "schedule": schedule,
        "allocation": allocation,
        "targets": targets,
        "ignore": ignore,
        "device": device,
        "dtype": dtype,
        "seed": seed,
        "trust_remote_code": trust_remote_code or None,
    }
    given |= read_settings(settings, NO_SETTINGS)
    model = model or _model_of(recipe)
    reporter = Reporter(quiet=quiet or not ranks.leads())
    result = api.prune(
        model, out=out, recipe=recipe, resume=resume, overwrite=overwrite, dry_run=dry_run, reporter=reporter, **given
    )
    if not ranks.leads():
        return
    if as_json:
        print(json.dumps(result.report))
    elif dry_run:
        _show_plan(result.report)
    else:
        _show_result(result.report, out)


@app.command()
def inspect(folder: Model, as_json: AsJson = False) -> None:
    """Count the zeros of every matrix in FOLDER, from the bytes."""
    from llmprune.inspection import inspect as look

    found = look(folder)
    if as_json:
        print(json.dumps(found))
        return
    table = Table("tensor", "shape", "zeros", "pattern")
    for row in found["tensors"]:
        table.add_row(row["name"], "x".join(map(str, row["shape"])), f"{row['sparsity']:.2%}", row["pattern"])
    Console().print(table)
    totals = found["totals"]
    print(
        f"{totals['params']:,} parameters, {totals['zeros']:,} zeros ({totals['zeros'] / totals['params']:.1%}), "
        f"{totals['bytes'] / 2**20:.1f} MiB"
    )


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Only this one, with its options.")] = None, as_json: AsJson = False
) -> None:
    """List every method: what it needs and what it can do; of NAME what it does, and its options with their defaults."""
    from llmprune.methods import describe, method_class

    rows = describe()
    if name is not None:
        method_class(name)  # refuses what is no method
        rows = [row for row in rows if row["name"] == name]
    if as_json:
        print(json.dumps(rows))
        return
    name_column, kind = (Column(head, no_wrap=True) for head in ("name", "kind"))
    table = Table(name_column, kind, Column("needs", max_width=12), "N:M", "paper")
    for row in rows:
        needs, patterns = ", ".join(row["needs"]) or "no data", "yes" if "N:M" in row["patterns"] else ""
        table.add_row(row["name"], row["kind"], needs, patterns, row["paper"])
    Console().print(table)
    if name is None:
        print("llmprune methods NAME says what one does, and its options")
        return
    print(f"{getdoc(method_class(name))}\n")
    steps = {key: value for key, value in rows[0]["steps"].items() if value not in (None, 0, "uniform")}
    for option, default in (rows[0]["options"] | steps).items():
        print(f"--set {option}={json.dumps(default)}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the model and the report.")] = Path("llmprune-demo"),
    quiet: Quiet = False,
) -> None:
    """Prune the small model that comes with the package, and show before and after."""
    from llmprune.demo import run

    run(out, quiet=quiet)


def _model_of(recipe: Path | None) -> str:
    from llmprune.recipe import load_recipe

    model = load_recipe(recipe, {}).model if recipe else ""
    if not model:
        raise UserError("name the model to prune: llmprune prune MODEL --out FOLDER --sparsity 0.5")
    return model


def _show_plan(report: dict[str, Any]) -> None:
    from llmprune.forecast import Forecast

    totals = report["totals"]
    if "structure" in report:
        structure = report["structure"]
        print(f"a {structure['kind']} method on {structure['units']} layers; it holds {structure['memory']}")
        if "widths" in structure:
            print(f"{_widths(structure)}; the model would have {totals['params_after']:,} parameters")
        return
    table = Table("matrix", "shape", "zeros")
    for row in report["tensors"]:
        table.add_row(row["name"], "x".join(map(str, row["shape"])), f"{row['planned']:,}")
    Console().print(table)
    print(
        f"{len(report['tensors'])} matrices, {totals['zeros']:,} of {totals['weights']:,} weights would become zero; "
        f"{len(report['left_alone'])} others are left alone"
    )
    if report["forecast"] is not None:
        print(Forecast(**report["forecast"]))


def _show_result(report: dict[str, Any], out: Path | None) -> None:
    run = report["run"]
    for warning in report["warnings"]:
        errors.print(f"warning: {warning}", markup=False, style="yellow", soft_wrap=True)
    print(
        f"{out}: {_achieved(report)}; {run['seconds']:.1f} s, "
        f"{run['peak_memory']['anonymous'] / 2**20:.0f} MiB at peak; {report['verified']}"
    )


def _achieved(report: dict[str, Any]) -> str:
    rows, totals = report["tensors"], report["totals"]
    if "structure" in report:
        before, after = totals["params_before"], totals["params_after"]
        zeros = f", of which {totals['zeros']:,} are zero" if totals["zeros"] else ""
        gone = report["structure"]["dropped"]
        layers = f"layers {', '.join(map(str, gone['layers']))} left out, " if gone["layers"] else ""
        experts = sorted({len(stay) for stay in gone["kept_experts"].values()})
        layers += f"{'/'.join(map(str, experts))} experts a layer, " if experts else ""
        layers += f"{_widths(report['structure'])}, " if "widths" in report["structure"] else ""
        return f"{layers}{after:,} of {before:,} parameters stay ({after / before:.1%}){zeros}"
    weights = sum(row["shape"][0] * row["shape"][1] for row in rows)
    zeros = f"{totals['zeros']:,} of their {weights:,} weights are zero ({totals['zeros'] / weights:.1%})"
    return f"{len(rows)} matrices pruned, {zeros}"


def _widths(structure: dict[str, Any]) -> str:
    """How many units of each kind stay in a layer."""
    parts = [f"{kind}s {'/'.join(map(str, counts))}" for kind, counts in structure["widths"].items()]
    return f"{' and '.join(parts)} a layer"


def _fail(code: int, text: str) -> NoReturn:
    if ranks.current().speaks:
        errors.print(f"error: {text}", markup=False, style="red", soft_wrap=True)
    sys.exit(code)


def main() -> None:
    """Run the command line; user errors exit with 2, failed runs with 1, each with one message."""
    if ranks.launched() and sys.argv[1:] and sys.argv[1] not in SHARED:
        _fail(2, f"{sys.argv[1]} runs in one process: start it without torchrun")
    hint = HINTS.get("".join(sys.argv[1:2]), "")
    try:
        app()
    except UserError as error:
        _fail(2, str(error))
    except RunError as error:
        _fail(1, f"{error}{hint}")
    except interruption.Interrupted:
        others = "; if it was not you, another process of the run has ended" if ranks.launched() else ""
        _fail(1, f"interrupted{others}{hint}")
