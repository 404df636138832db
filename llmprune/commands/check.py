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
    # many methods have the same answer
    alike: dict[tuple[str, str, str], list[str]] = {}
    for row in found["methods"]:
        answer = row["what"] if row["can"] else f"no: {row['why']}"
        alike.setdefault((row["kind"], answer, row.get("output", "")), []).append(row["name"])
    table = Table("kind", "methods", "can prune, or what is in the way", "output", show_lines=True)
    for (kind, answer, output), names in alike.items():
        table.add_row(kind, ", ".join(names), answer, output)
    Console().print(table)
