"""The tables of a report, for the page and for papers."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from llmprune.report import words
from llmprune.report.words import short

FORMATS = ("md", "tex", "csv")
# What was measured: a text or a task, and the head, which says by which protocol.
Column = tuple[str, str]


def summary(runs: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The table of all runs: heads, and a row a run with the dense baseline above it where one was measured.

    What was measured by another protocol stands in another column.
    """
    measured = [run.get("evaluation", {}) for run in runs]
    columns = list(dict.fromkeys(column for part in (_texts, _tasks) for one in measured for column in part(one)))
    heads = ["model", "method", "amount", "parameters", "zeros", *(head for _, head in columns)]
    rows: list[list[str]] = []
    for run, found in zip(runs, measured, strict=True):
        totals, dense = run["totals"], found.get("baseline")
        if dense is not None:
            label = f"dense {Path(dense['model']).name}"
            row = [label, "–", "–", f"{totals['params_before']:,}", "–", *_scores(dense, columns)]
            if row not in rows:
                rows.append(row)
        zeros = f"{totals['zeros'] / totals['params_after']:.1%}"
        row = [run["name"], words.methods(run), words.amounts(run), f"{totals['params_after']:,}", zeros]
        rows.append(row + _scores(found, columns))
    return heads, rows


def table(heads: list[str], rows: list[list[str]], form: str) -> str:
    """A table as Markdown (`md`), LaTeX with booktabs (`tex`) or CSV (`csv`)."""
    if form == "csv":
        target = io.StringIO()
        csv.writer(target, lineterminator="\n").writerows([heads, *rows])
        return target.getvalue()
    if form == "md":
        cells = [heads, ["---"] * len(heads), *rows]
        return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in cells)
    body = [" & ".join(_latex(cell) for cell in line) + r" \\" for line in rows]
    head = " & ".join(_latex(cell) for cell in heads) + r" \\"
    aligned = "l" * 3 + "r" * (len(heads) - 3)
    lines = [
        rf"\begin{{tabular}}{{{aligned}}}",
        r"\toprule",
        head,
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _scores(measured: dict[str, Any], columns: list[Column]) -> list[str]:
    cells = {**_texts(measured), **_tasks(measured)}
    return [cells.get(column, "–") for column in columns]


def _texts(measured: dict[str, Any]) -> dict[Column, str]:
    return {
        (spec, f"perplexity, {short(spec)} ({words.windows(row)})"): f"{row['ppl']:.3f}"
        for spec, row in measured.get("perplexity", {}).items()
    }


def _tasks(measured: dict[str, Any]) -> dict[Column, str]:
    cells = {}
    for name, row in measured.get("tasks", {}).items():
        for metric, error in row["stderr"].items():
            if isinstance(row.get(metric), float):
                spread = f" ± {error:.2g}" if error is not None else ""
                cells[name, f"{name}, {metric} ({words.prompts(row)})"] = f"{row[metric]:.4g}{spread}"
    return cells


def _latex(text: str) -> str:
    special = {
        "\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "–": "--", "±": r"$\pm$",
    }  # fmt: skip
    return "".join(special.get(one, f"\\{one}" if one in "&%$#_{}" else one) for one in text)
