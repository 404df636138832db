"""A report on one page: self-contained, no network. Figures need the extra `report`; the rest does not."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader

from llmprune.types import UserError

# A rise of perplexity beyond this factor is called out at the top of the page.
BUDGET = 1.1
TABLE_FORMATS = ("md", "tex", "csv")


def read_run(folder: Path) -> dict[str, Any]:
    """The report of a pruned model, named after its folder; raises UserError if there is none."""
    path = folder / "llmprune.json"
    try:
        run: dict[str, Any] = json.loads(path.read_text())
        if not all(key in run for key in ("recipe", "tensors", "totals", "versions", "run")):
            raise ValueError("parts are missing")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} is no run of llmprune: {path.name} cannot be read ({error})") from error
    return {"name": folder.resolve().name, **run}


def write_page(path: Path, runs: list[dict[str, Any]], *, budget: float = BUDGET, figures: bool = True) -> None:
    """Write one page about `runs` (see `read_run`). Raises UserError if figures are wanted but cannot be drawn.

    `budget`: the perplexity ratio to the dense model beyond which the page warns.
    """
    specs, script = _drawn(runs) if figures else ({}, "")
    # everything that comes from outside (model names, generated text) is escaped
    pages = Environment(
        loader=PackageLoader("llmprune.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    html = pages.get_template("page.html").render(
        runs=[_view(run, budget) for run in runs],
        columns=(columns := summary(runs))[0],
        rows=columns[1],
        specs=specs,
        spec_json=json.dumps(specs).replace("<", "\\u003c"),
        script=script.replace("</script", "<\\/script"),
    )
    path.write_text(html, encoding="utf-8")


def write_figures(folder: Path, runs: list[dict[str, Any]], formats: tuple[str, ...] = ("svg", "png")) -> list[Path]:
    """The figures as files for papers, and the summary as Markdown, LaTeX and CSV; returns what was written."""
    charts = _charts(runs)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for title, chart in charts.items():
        for ending in formats:
            target = folder / f"{_slug(title)}.{ending}"
            chart.properties(width=520).save(target, scale_factor=2 if ending == "png" else 1)
            written.append(target)
    for ending in TABLE_FORMATS:
        target = folder / f"summary.{ending}"
        target.write_text(table(*summary(runs), ending), encoding="utf-8")
        written.append(target)
    return written


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
        measured, recipe, totals = run.get("evaluation", {}), run["recipe"], run["totals"]
        dense = measured.get("baseline")
        if dense is not None:
            label = f"dense {Path(dense['model']).name}"
            row = [label, "–", "–", f"{totals['params_before']:,}", "–", *_scores(dense, texts, metrics)]
            if row not in rows:
                rows.append(row)
        amount = recipe["pattern"] if recipe["pattern"] != "unstructured" else f"{recipe['sparsity']:g}"
        zeros = f"{totals['zeros'] / totals['params_after']:.1%}"
        row = [run["name"], recipe["method"], amount, f"{totals['params_after']:,}", zeros]
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


def short(spec: str) -> str:
    """A text SPEC without folders."""
    kind, colon, rest = spec.partition(":")
    return Path(rest).name if kind == "file" and colon else spec


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


def _view(run: dict[str, Any], budget: float) -> dict[str, Any]:
    """A run with what the page says about it in words."""
    worst = max((row["error"] or 0.0 for row in run["tensors"]), default=0.0)
    evaluation = run.get("evaluation", {})
    baseline = evaluation.get("baseline", {})
    samples = [
        {**row, "dense": baseline["generation"][number]["text"] if "generation" in baseline else None}
        for number, row in enumerate(evaluation.get("generation", []))
    ]
    warnings = [*run.get("warnings", []), *_quality(run, evaluation, budget)]
    return {**run, "recipe_text": yaml.safe_dump(run["recipe"], sort_keys=False), "worst": worst or 1.0,
            "all_warnings": warnings, "samples": samples, "evaluation": evaluation}  # fmt: skip


def _quality(run: dict[str, Any], evaluation: dict[str, Any], budget: float) -> list[str]:
    """What a reader must know before believing the figures."""
    found = []
    for spec, row in evaluation.get("comparison", {}).get("perplexity", {}).items():
        if not math.isfinite(row["ratio"]) or row["ratio"] > budget:
            found.append(
                f"perplexity on {short(spec)} is {row['ratio']:.2f} times the dense model's (budget {budget:g})"
            )
    source = (run.get("calibration") or {}).get("source", "")
    if source in evaluation.get("perplexity", {}) and source.startswith("file:"):
        found.append(f"calibration and evaluation text are the same ({short(source)}): the perplexity flatters")
    if not evaluation:
        found.append("quality was not measured: llmprune eval DIR --baseline DENSE --record")
    return found


def _charts(runs: list[dict[str, Any]]) -> dict[str, Any]:
    try:
        from llmprune.report.figures import figures, trade_off
    except ImportError as error:
        raise UserError(f"figures need the package {error.name}: pip install 'llmprune[report]'") from error
    charts = trade_off(runs)
    for run in runs:
        charts.update({f"{run['name']}: {title}": chart for title, chart in figures(run).items()})
    return charts


def _drawn(runs: list[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    charts = _charts(runs)
    import vl_convert

    return {title: chart.to_dict() for title, chart in charts.items()}, vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub lacks the default


def _slug(title: str) -> str:
    return "".join(one if one.isalnum() else "-" for one in title.lower()).strip("-").replace("--", "-")


def _latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "–": "--", "±": r"$\pm$"}
    return "".join(special.get(one, f"\\{one}" if one in "&%$#_{}" else one) for one in text)
