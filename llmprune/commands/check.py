"""`llmprune check`: what each method can do to a model."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from llmprune.commands import AsJson, Model, Trust


def check(
    model: Model,
    ratio: Annotated[float, typer.Option(help="What width methods are asked to take out.")] = 0.25,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Say what every method can do to MODEL, and why not, from its config.json alone."""
    from llmprune.checking import check as look

    found = look(model, ratio=ratio, trust_remote_code=trust_remote_code)
    if as_json:
        print(json.dumps(found))
        return
    print(f"{found['class']}, {found['params']:,} parameters; width methods at ratio {ratio:g}")
    table = Table("method", "kind", "can prune, or what is in the way", "output")
    for row in found["methods"]:
        table.add_row(
            row["name"], row["kind"], row["what"] if row["can"] else f"no: {row['why']}", row.get("output", "")
        )
    Console().print(table)
