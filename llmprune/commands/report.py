"""`llmprune report`: one page about one or several pruned models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmprune.types import UserError


def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of pruned models.")],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    figures: Annotated[
        Path | None, typer.Option(help="Folder for figures (SVG, PNG) and tables (md, tex, csv).")
    ] = None,
    budget: Annotated[float, typer.Option(help="Perplexity ratio to dense beyond which the page warns.")] = 1.1,
) -> None:
    """Write one self-contained page about FOLDERS: figures, tables, samples, recipe."""
    from llmprune.report.page import read_run, write_figures, write_page

    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"--out {out} must be a file in a folder that exists")
    runs = [read_run(folder) for folder in folders]
    names = [run["name"] for run in runs]
    if len(set(names)) < len(names):
        raise UserError(f"the folders must have different names, not {', '.join(names)}")
    write_page(out, runs, budget=budget)
    if figures is not None:
        write_figures(figures, runs)
    print(out)
