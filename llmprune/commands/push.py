"""`llmprune push`: upload a finished run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from llmprune.commands import AsJson


def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hub: NAMESPACE/NAME.")],
    public: Annotated[bool, typer.Option("--public", help="Create it public; private otherwise.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; created if it is not there.")] = None,
    pull_request: Annotated[bool, typer.Option("--pull-request", help="Open a pull request.")] = False,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the dense model, for the card.")] = None,
    license: Annotated[str | None, typer.Option(help="Licence; that of the dense model's card by default.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the files and the card.")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload FOLDER to the Hub as REPO_ID, with a model card."""
    from llmprune.hub import push as upload

    done = upload(
        folder,
        repo_id,
        private=not public,
        revision=revision,
        create_pr=pull_request,
        base_model=base_model,
        license=license,
        dry_run=dry_run,
    )
    if as_json:
        print(json.dumps(done))
        return
    for note in done["notes"]:
        print(note, file=sys.stderr)
    for file in done["files"]:
        print(f"{file['bytes']:>14,}  {file['name']}")
    if dry_run:
        print(f"\nnothing was sent; {repo_id} would get this card:\n\n{done['card']}")
    else:
        print(f"\n{done['pull_request_url'] or done['url']}")
