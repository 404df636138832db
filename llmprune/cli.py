"""The command line: every command builds a recipe or a call of the Python interface."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import yaml
from rich.console import Console
from rich.table import Column, Table

from llmprune.types import RunError, UserError

app = typer.Typer(
    help="Post-training pruning of Hugging Face language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
errors = Console(stderr=True, highlight=False)

# Arguments of `api.prune` that are no part of a recipe.
NO_SETTINGS = ("model", "out", "recipe", "tokenizer", "resume", "overwrite", "dry_run", "reporter")

Model = Annotated[str, typer.Argument(help="Model folder, or Hub id (@REVISION allowed).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run modelling code that the checkpoint brings.")]


@app.command()
def prune(
    model: Annotated[str | None, typer.Argument(help="Model folder, or Hub id (@REVISION allowed).")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the pruned model.")] = None,
    method: Annotated[str | None, typer.Option(help="Pruning method; see `llmprune methods`.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Fraction of weights set to zero.")] = None,
    pattern: Annotated[str | None, typer.Option(help="KEEP:GROUP along the inputs, for example 2:4.")] = None,
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
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any recipe key or method option.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="Recipe file; options win over it.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the forward passes: float32, bfloat16, float16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random choice.")] = None,
    trust_remote_code: Trust = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
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
    given.update(_settings(settings or []))
    model = model or _model_of(recipe)
    reporter = Reporter(quiet=quiet)
    result = api.prune(
        model, out=out, recipe=recipe, resume=resume, overwrite=overwrite, dry_run=dry_run, reporter=reporter, **given
    )
    if as_json:
        print(json.dumps(result.report))
    elif dry_run:
        _show_plan(result.report)
    else:
        _show_result(result.report, out)


@app.command("eval")
def evaluate(
    model: Model,
    perplexity: Annotated[list[str] | None, typer.Option(help="Text SPEC; may be repeated.")] = None,
    seqlen: Annotated[int, typer.Option(help="Tokens a window.")] = 2048,
    stride: Annotated[int | None, typer.Option(help="Distance of windows; they do not overlap by default.")] = None,
    max_windows: Annotated[int | None, typer.Option(help="Measure only the first windows.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows a batch.")] = 8,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "auto",
    trust_remote_code: Trust = False,
    out: Annotated[Path | None, typer.Option(help="JSON file for the result.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure MODEL: perplexity on texts."""
    from llmprune import api

    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise UserError(f"--out {out} must be a file in a folder that exists")
    result = api.evaluate(
        model,
        perplexity=perplexity or [],
        seqlen=seqlen,
        stride=stride,
        max_windows=max_windows,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")
    if as_json:
        print(json.dumps(result))
        return
    table = Table(Column("text", overflow="fold"), "perplexity", "tokens", "window", "stride", "BOS", "dtype")
    for spec, row in result["perplexity"].items():
        bos = "yes" if row["bos"] else "no"
        table.add_row(
            spec, f"{row['ppl']:.3f}", str(row["tokens"]), str(row["seqlen"]), str(row["stride"]), bos, row["dtype"]
        )
    Console().print(table)


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
def methods(as_json: AsJson = False) -> None:
    """List every method: what it needs and what it can do."""
    from llmprune.methods import describe

    rows = describe()
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("name", "kind", "needs", "patterns", "output", "paper")
    for row in rows:
        needs, patterns = ", ".join(row["needs"]) or "no data", ", ".join(row["patterns"])
        table.add_row(row["name"], row["kind"], needs, patterns, row["output"], row["paper"])
    Console().print(table)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the model and the report.")] = Path("llmprune-demo"),
    quiet: Quiet = False,
) -> None:
    """Prune the small model that comes with the package, and show before and after."""
    from llmprune.demo import run

    run(out, quiet=quiet)


def _settings(pairs: list[str]) -> dict[str, Any]:
    """`KEY=VALUE` pairs, values read as YAML: 0.1, true, [a, b]; raises UserError."""
    from llmprune.recipe import read_yaml

    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"--set {pair!r} must have the form KEY=VALUE")
        if key in NO_SETTINGS:
            raise UserError(f"--set {pair!r}: {key} is no recipe key, but an argument of the command")
        try:
            found[key] = read_yaml(value)
        except yaml.YAMLError as error:
            raise UserError(f"--set {pair!r}: the value is not understood: {error}") from error
    return found


def _model_of(recipe: Path | None) -> str:
    from llmprune.recipe import load_recipe

    model = load_recipe(recipe, {}).model if recipe else ""
    if not model:
        raise UserError("name the model to prune: llmprune prune MODEL --out FOLDER --sparsity 0.5")
    return model


def _show_plan(report: dict[str, Any]) -> None:
    totals = report["totals"]
    table = Table("matrix", "shape", "zeros")
    for row in report["tensors"]:
        table.add_row(row["name"], "x".join(map(str, row["shape"])), f"{row['planned']:,}")
    Console().print(table)
    print(
        f"{len(report['tensors'])} matrices, {totals['zeros']:,} of {totals['weights']:,} weights would become zero; "
        f"{len(report['left_alone'])} others are left alone"
    )


def _show_result(report: dict[str, Any], out: Path | None) -> None:
    rows, totals, run = report["tensors"], report["totals"], report["run"]
    weights = sum(row["shape"][0] * row["shape"][1] for row in rows)
    for warning in report["warnings"]:
        errors.print(f"warning: {warning}", markup=False, style="yellow", soft_wrap=True)
    print(
        f"{out}: {len(rows)} matrices pruned, {totals['zeros']:,} of their {weights:,} weights are zero "
        f"({totals['zeros'] / weights:.1%}); {run['seconds']:.1f} s, "
        f"{run['peak_memory']['anonymous'] / 2**20:.0f} MiB at peak; {report['verified']}"
    )


def _fail(code: int, text: str) -> NoReturn:
    errors.print(f"error: {text}", markup=False, style="red", soft_wrap=True)
    sys.exit(code)


class _Interrupted(BaseException):
    """Ctrl-C or SIGTERM. Not KeyboardInterrupt: typer would end the program on that, with no word on resuming."""


def _interrupt(number: int, frame: object) -> NoReturn:
    raise _Interrupted


def main() -> None:
    """Run the command line; user errors exit with 2, failed runs with 1, each with one message."""
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    resumable = "prune" in sys.argv[1:2]
    hint = "\nwhat is finished is kept; run the same command with --resume to go on" if resumable else ""
    try:
        app()
    except UserError as error:
        _fail(2, str(error))
    except RunError as error:
        _fail(1, f"{error}{hint}")
    except _Interrupted:
        _fail(1, f"interrupted{hint}")
