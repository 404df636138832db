"""Commands of the command line that are more than a screen long, a file each; `llmprune.cli` puts them together."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="Model folder, or Hub id (@REVISION allowed).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run modelling code that the checkpoint brings.")]
