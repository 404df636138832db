"""Rows of the task files: JSON lines in a folder of the user's, never fetched."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from llmprune.types import UserError

FOLDER_VARIABLE = "LLMPRUNE_TASK_DATA"


def read(file: str, folder: str | None = None, spread: str | None = None, **_: Any) -> dict[str, Any]:
    """The rows of `file` as lm-eval takes them: {"test": dataset}. Raises UserError if it is not there.

    `folder` comes from lm-eval's metadata, or from the variable LLMPRUNE_TASK_DATA. `spread`: a field whose
    values take turns, so that the first rows, which `--limit` keeps, hold all of them alike.
    """
    from datasets import Dataset

    # not splitlines(): a text may hold the other line ends that Unicode knows
    lines = locate(file, folder).read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line.strip()]
    if spread is not None:
        turns: dict[str, int] = {}
        for row in rows:
            row["turn"] = turns[row[spread]] = turns.get(row[spread], -1) + 1
        rows.sort(key=lambda row: row["turn"])  # stable: the order of the file within a turn
    return {"test": Dataset.from_list(rows)}


def read_pages(file: str, folder: str | None = None, **_: Any) -> dict[str, Any]:
    """The articles of a raw WikiText file, cut where a heading of the first level stands."""
    from datasets import Dataset

    text = locate(file, folder).read_text(encoding="utf-8")
    starts = [match.start() for match in re.finditer(r"^ = [^=\n]+ = $", text, re.MULTILINE)]
    pages = [text[start:end] for start, end in zip([0, *starts], [*starts, len(text)], strict=True)]
    return {"test": Dataset.from_list([{"page": page} for page in pages if page.strip()])}


def locate(file: str, folder: str | None) -> Path:
    """The path of a task file; raises UserError with what to set."""
    where = folder or os.environ.get(FOLDER_VARIABLE)
    if not where:
        raise UserError(
            f"the local tasks need the folder that holds {file}: pass --task-data FOLDER, or set {FOLDER_VARIABLE}"
        )
    path = Path(where).expanduser() / file
    if not path.is_file():
        raise UserError(f"there is no {file} in the task folder {where}")
    return path
