"""Commands of the command line that are more than a screen long, a file each; `llmprune.cli` puts them together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from llmprune.types import UserError

Model = Annotated[str, typer.Argument(help="Model folder, or Hub id (@REVISION allowed).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run modelling code that the checkpoint brings.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, …")]
Dtype = Annotated[str | None, typer.Option(help="Of the forward passes: float32, bfloat16, float16.")]
Seed = Annotated[int | None, typer.Option(help="Seed of every random choice.")]
RecipeFile = Annotated[Path | None, typer.Option(help="Recipe file; options win over it.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
ResultFile = Annotated[Path | None, typer.Option(help="JSON file for the result.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any recipe key or option of the method or kind.")
]


def read_settings(pairs: list[str] | None, no_settings: tuple[str, ...]) -> dict[str, Any]:
    """`KEY=VALUE` pairs, values read as YAML: 0.1, true, [a, b]; raises UserError, also for a key of `no_settings`."""
    from llmprune.recipe import read_yaml

    found = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"--set {pair!r} must have the form KEY=VALUE")
        if key in no_settings:
            raise UserError(f"--set {pair!r}: {key} is no recipe key, but an argument of the command")
        try:
            found[key] = read_yaml(value)
        except yaml.YAMLError as error:
            raise UserError(f"--set {pair!r}: the value is not understood: {error}") from error
    return found
