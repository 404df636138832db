"""A report on one page: self-contained, no network. Figures need the extra `report`; the rest does not."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader

from llmprune.checkpoint.output import REPORT_NAME
from llmprune.report import words
from llmprune.report.front import costs
from llmprune.report.searched import budget_sentences, calibrated, scan_table, sweep_table
from llmprune.report.tables import FORMATS, summary, table
from llmprune.report.words import short
from llmprune.types import UserError

# A rise of perplexity beyond this factor is called out at the top of the page.
BUDGET = 1.1


def read_run(folder: Path) -> dict[str, Any]:
    """The report of a pruned model, named after its folder; raises UserError if there is none."""
    path = folder / REPORT_NAME
    try:
        run: dict[str, Any] = json.loads(path.read_text())
        if not all(key in run for key in ("recipe", "tensors", "totals", "versions", "run")):
            raise ValueError("parts are missing")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} is no run of llmprune: {path.name} cannot be read ({error})") from error
    return {"name": folder.resolve().name, **run}


def render(
    runs: list[dict[str, Any]],
    searches: Sequence[dict[str, Any]] = (),
    *,
    budget: float = BUDGET,
    figures: bool = True,
) -> str:
    """One page about `runs` (see `read_run`) and `searches` (see `searched.read_search`), as HTML.

    `budget`: the perplexity ratio to the dense model beyond which the page warns. Raises UserError if figures are
    wanted but cannot be drawn.
    """
    specs, script = _drawn(runs, searches) if figures else ({}, "")
    # everything that comes from outside (model names, generated text) is escaped
    pages = Environment(
        loader=PackageLoader("llmprune.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return pages.get_template("page.html").render(
        title=_title(runs, searches),
        runs=[_view(run, budget) for run in runs],
        searches=[_search_view(found) for found in searches],
        columns=(columns := summary(runs))[0],
        rows=columns[1],
        specs=specs,
        words=words,
        compared=shared_protocol(runs),
        spec_json=json.dumps(specs).replace("<", "\\u003c"),
        script=script.replace("</script", "<\\/script"),
    )


def write_page(path: Path, runs: list[dict[str, Any]], searches: Sequence[dict[str, Any]] = (), **options: Any) -> None:
    """Write the page; `options` as in `render`."""
    path.write_text(render(runs, searches, **options), encoding="utf-8")


def write_figures(
    folder: Path,
    runs: list[dict[str, Any]],
    searches: Sequence[dict[str, Any]] = (),
    formats: tuple[str, ...] = ("svg", "png"),
) -> list[Path]:
    """The figures as files for papers, and the tables as Markdown, LaTeX and CSV; returns what was written."""
    charts = _charts(runs, searches)
    tables = {"summary": summary(runs)} if runs else {}
    for found in searches:
        for name, (heads, rows) in (("sweep", sweep_table(found)), ("scan", scan_table(found))):
            if rows:
                tables[f"{found['name']} {name}"] = heads, rows
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    names = _file_names([*charts, *tables])
    for title, chart in charts.items():
        for ending in formats:
            target = folder / f"{names[title]}.{ending}"
            chart.properties(width=520).save(target, format=ending, scale_factor=2 if ending == "png" else 1)
            written.append(target)
    for title, (heads, rows) in tables.items():
        for ending in FORMATS:
            target = folder / f"{names[title]}.{ending}"
            target.write_text(table(heads, rows, ending), encoding="utf-8")
            written.append(target)
    return written


def _title(runs: list[dict[str, Any]], searches: Sequence[dict[str, Any]]) -> str:
    if len(runs) == 1 and not searches:
        return f"{runs[0]['name']}: pruned by {words.methods(runs[0])}"
    if not runs:
        return f"How much {Path(searches[0]['model']).name} can lose"
    return f"{len(runs)} pruned model{'s' if len(runs) > 1 else ''}"


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
    stages = [
        {
            "method": stage["recipe"]["method"],
            "amount": words.amount(stage["recipe"]),
            "params": stage["totals"]["params_after"],
            "zeros": stage["totals"]["zeros"],
            "seconds": stage["run"]["seconds"],
        }
        for stage in run.get("stages", [])
    ]
    seconds = sum(stage["run"]["seconds"] for stage in run.get("stages", [run]))
    return {**run, "steps": stages, "seconds": seconds, "method": words.methods(run), "recipe_text": yaml.safe_dump(run["recipe"], sort_keys=False), "worst": worst or 1.0,
            "all_warnings": warnings, "calibrations": words.calibrations(run), "samples": samples, "evaluation": evaluation}  # fmt: skip


def _quality(run: dict[str, Any], evaluation: dict[str, Any], budget: float) -> list[str]:
    """What a reader must know before believing the figures."""
    found = []
    for spec, row in evaluation.get("comparison", {}).get("perplexity", {}).items():
        if not math.isfinite(row["ratio"]) or row["ratio"] > budget:
            found.append(
                f"perplexity on {short(spec)} is {row['ratio']:.2f} times the dense model's (budget {budget:g})"
            )
    found += words.flattering(run)
    if not evaluation:
        found.append("quality was not measured: llmprune eval DIR --perplexity SPEC --baseline DENSE --record")
    return found


def _search_view(found: dict[str, Any]) -> dict[str, Any]:
    """A search with its tables and sentences."""
    windows = found["dense"]["protocol"]
    return {
        **found,
        "base": Path(found["model"]).name,
        "sentences": budget_sentences(found),
        "tables": {"Models": sweep_table(found), "Each layer alone": scan_table(found)},
        "protocol": f"Perplexity on {found['asked']['perplexity']}: {words.windows(windows)}, {windows['dtype']}. "
        f"{calibrated(found)}",
    }


def shared_protocol(runs: list[dict[str, Any]]) -> str | None:
    """Text and windows by which the perplexity of several runs was measured, the first if there are more."""
    known = [protocol for run in runs for protocol in _by_protocol(run.get("evaluation", {}))]
    return next((one for one in known if known.count(one) > 1), None)


def _by_protocol(measured: dict[str, Any]) -> dict[str | None, dict[str, Any]]:
    return {f"{spec}, {words.windows(row)}": row for spec, row in measured.get("perplexity", {}).items()}


def run_points(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Perplexity and costs of each run, and of the dense model, by the first protocol that several were measured by."""
    shared = shared_protocol(runs)
    points = []
    for run in runs:
        measured, totals = run.get("evaluation", {}), run["totals"]
        dense = _by_protocol(measured.get("baseline", {})).get(shared)
        if dense is not None:
            whole = {"params_before": totals["params_before"], "params_after": totals["params_before"], "zeros": 0}
            points.append({"label": "dense", "method": "dense", "ppl": dense["ppl"], "zeros": 0,
                           "params": totals["params_before"], **costs(whole)})  # fmt: skip
        found = _by_protocol(measured).get(shared)
        if found is not None:
            points.append({"label": run["name"], "method": words.methods(run), "ppl": found["ppl"],
                           "zeros": totals["zeros"], "params": totals["params_after"], **costs(totals)})  # fmt: skip
    return [point for number, point in enumerate(points) if point not in points[:number]]


def _charts(runs: list[dict[str, Any]], searches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    try:
        from llmprune.report.figures import figures
        from llmprune.report.fronts import search_figures, trade_offs

        importlib.import_module("vl_convert")  # what altair saves with, and the page's script
    except ImportError as error:
        raise UserError(f"figures need the package {error.name}: pip install 'llmprune[report]'") from error
    charts = trade_offs(run_points(runs))
    for found in searches:
        charts.update({f"{found['name']}: {title}": chart for title, chart in search_figures(found).items()})
    for run in runs:
        charts.update({f"{run['name']}: {title}": chart for title, chart in figures(run).items()})
    return charts


def _drawn(runs: list[dict[str, Any]], searches: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    charts = _charts(runs, searches)
    import vl_convert

    return {title: chart.to_dict() for title, chart in charts.items()}, vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub lacks the default


def _file_names(titles: list[str]) -> dict[str, str]:
    """A name for the files of each title, no two the same: those that would be are numbered."""
    taken: dict[str, str] = {}
    for title in titles:
        plain = re.sub(r"[^\w.]+", "-", title.lower()).strip("-.")
        numbered = (f"{plain}-{number}" for number in itertools.count(2))
        name = next(one for one in itertools.chain([plain], numbered) if one not in taken.values())
        taken[title] = name
    return taken
