"""The tables of a report, for the page and for papers."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from llmprune.report import words
from llmprune.report.words import short

FORMATS = ("md", "tex", "csv")


def summary(runs: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The table of all runs: heads, and a row a run with the dense baseline above it where one was measured."""
    texts = list(dict.fromkeys(spec for run in runs for spec in run.get("evaluation", {}).get("perplexity", {})))
    metrics = list(
        dict.fromkeys(
            (name, metric)
            for run in runs
            for name, row in run.get("evaluation", {}).get("tasks", {}).items()
            for metric in row["stderr"]
            if isinstance(row.get(metric), float)
        )
    )
    heads = ["model", "method", "amount", "parameters", "zeros"]
    heads += [f"perplexity, {short(spec)}" for spec in texts] + [f"{name}, {metric}" for name, metric in metrics]
    rows: list[list[str]] = []
    for run in runs:
        measured, totals = run.get("evaluation", {}), run["totals"]
        dense = measured.get("baseline")
        if dense is not None:
            label = f"dense {Path(dense['model']).name}"
            row = [label, "–", "–", f"{totals['params_before']:,}", "–", *_scores(dense, texts, metrics)]
            if row not in rows:
                rows.append(row)
        zeros = f"{totals['zeros'] / totals['params_after']:.1%}"
        row = [run["name"], words.methods(run), words.amounts(run), f"{totals['params_after']:,}", zeros]
        rows.append(row + _scores(measured, texts, metrics))
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


def _scores(measured: dict[str, Any], texts: list[str], metrics: list[tuple[str, str]]) -> list[str]:
    cells = []
    for spec in texts:
        row = measured.get("perplexity", {}).get(spec)
        cells.append("–" if row is None else f"{row['ppl']:.3f}")
    for name, metric in metrics:
        row = measured.get("tasks", {}).get(name)
        error = None if row is None else row["stderr"].get(metric)
        cells.append("–" if row is None else f"{row[metric]:.4g}" + (f" ± {error:.2g}" if error is not None else ""))
    return cells


def _latex(text: str) -> str:
    special = {
        "\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "–": "--", "±": r"$\pm$",
    }  # fmt: skip
    return "".join(special.get(one, f"\\{one}" if one in "&%$#_{}" else one) for one in text)
