"""`llmprune report`: one page about pruned models and searches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmprune.types import UserError


def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of pruned models, and of searches.")],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    figures: Annotated[
        Path | None, typer.Option(help="Folder for figures (SVG, PNG) and tables (md, tex, csv).")
    ] = None,
    budget: Annotated[float, typer.Option(help="Perplexity ratio to dense beyond which the page warns.")] = 1.1,
) -> None:
    """Write one self-contained page about FOLDERS: figures, tables, samples, recipe."""
    from llmprune.report.page import read_run, write_figures, write_page
    from llmprune.report.searched import NAME, read_search

    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"--out {out} must be a file in a folder that exists")
    if figures is not None and not next(one for one in (figures, *figures.absolute().parents) if one.exists()).is_dir():
        raise UserError(f"--figures {figures} must be a folder")
    searches = [read_search(folder) for folder in folders if (folder / NAME).is_file()]
    runs = [read_run(folder) for folder in folders if not (folder / NAME).is_file()]
    names = [one["name"] for one in (*runs, *searches)]
    if len(set(names)) < len(names):
        raise UserError(f"the folders must have different names, not {', '.join(names)}")
    write_page(out, runs, searches, budget=budget)
    if figures is not None:
        write_figures(figures, runs, searches)
    print(out)
