"""What a search found, in tables and sentences for the command line and the report page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmprune.report.front import COSTS, costs, front
from llmprune.types import UserError

NAME = "search.json"


def read_search(folder: Path) -> dict[str, Any]:
    """The result of a search, named after its folder; raises UserError if it cannot be read."""
    try:
        found: dict[str, Any] = json.loads((folder / NAME).read_text())
        if not all(key in found for key in ("model", "dense", "asked", "recipe")):
            raise ValueError("parts are missing")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no search of llmprune: {NAME} cannot be read ({error})") from error
    return {"name": folder.resolve().name, **found}


def sweep_points(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The dense model and every whole run of a sweep or of the search for a budget, once each: costs and perplexity."""
    rows = list(found.get("sweep", []))
    for method in found.get("budget", {}).get("methods", []):
        rows += [row for row in method["tried"] if row["kind"] == "run"]
    points = [
        {
            "label": f"{row['method']} {row['amount']}",
            "method": row["method"],
            "ppl": row["ppl"],
            "zeros": row["zeros"],
            "params": row["params_after"],
            **costs(row),
        }
        for row in rows
    ]
    if not points:
        return []
    dense = {
        "label": "dense", "method": "dense", "ppl": found["dense"]["ppl"], "zeros": 0,
        "params": rows[0]["params_before"], **{key: 1.0 for key in COSTS if key in points[0]},
    }  # fmt: skip
    # of a model that both measured, the row of the sweep: only that one may have times
    unique: dict[str, dict[str, Any]] = {}
    for point in [dense, *points]:
        unique.setdefault(point["label"], point)
    return list(unique.values())


def sweep_table(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads, and a row a model; a star marks those that no other beats on perplexity and that cost."""
    points = sweep_points(found)
    measured = [key for key in COSTS if any(key in point for point in points)]
    best = {key: _best(points, key) for key in measured}
    heads = ["model", "perplexity", "× dense", *(COSTS[key].name for key in measured)]
    rows = []
    for point in points:
        shares = [
            f"{point[key]:.1%}" + (" *" if point["label"] in best[key] else "") if key in point else "–"
            for key in measured
        ]
        ratio = point["ppl"] / found["dense"]["ppl"]
        rows.append([point["label"], f"{point['ppl']:.3f}", f"{ratio:.3f}", *shares])
    return heads, rows


def _best(points: list[dict[str, Any]], key: str) -> set[str]:
    """The models that no other beats on perplexity and a cost, of those whose cost is known."""
    known = [point for point in points if key in point]
    on_front = front((point["ppl"], point[key]) for point in known)
    return {point["label"] for point, best in zip(known, on_front, strict=True) if best}


def scan_points(found: dict[str, Any]) -> list[dict[str, Any]]:
    """How many times the dense model's perplexity it costs to prune a layer alone, by layer and by what was done."""
    layers = list(dict.fromkeys(row["layer"] for row in found.get("scan", [])))
    return [
        {
            "layer": layers.index(row["layer"]),
            "done": "left out" if "drop_layers" in row else f"{row['method']} {row['amount']}",
            "ratio": row["ppl"] / found["dense"]["ppl"],
            "ppl": row["ppl"],
        }
        for row in found.get("scan", [])
    ]


def scan_table(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads, and a row a layer: the perplexity as a multiple of the dense model's."""
    points = scan_points(found)
    columns = list(dict.fromkeys(point["done"] for point in points))
    cells = {(point["layer"], point["done"]): f"{point['ratio']:.3f}" for point in points}
    layers = sorted({point["layer"] for point in points})
    return ["layer", *columns], [[str(one), *(cells.get((one, column), "–") for column in columns)] for one in layers]


def calibrated(found: dict[str, Any]) -> str:
    """What the pruned models were calibrated on, "" if none read a text."""
    tried = [row for method in found.get("budget", {}).get("methods", []) for row in method["tried"]]
    rows = [row for row in (*found.get("sweep", []), *found.get("scan", []), *tried) if row.get("calibration")]
    seed, methods = found["recipe"]["seed"], ", ".join(dict.fromkeys(row["method"] for row in rows))
    texts = {
        f"{text['sequences']} sequences of up to {text['longest']} tokens of {text['source']}"
        for text in (row["calibration"] for row in rows)
    }
    return f"Calibrated ({methods}) on {', '.join(sorted(texts))}, seed {seed}." if rows else ""


def budget_sentences(found: dict[str, Any]) -> list[str]:
    """What the search for a budget came to, method by method and in the end."""
    budget = found.get("budget")
    if budget is None:
        return []
    said = [f"Budget {budget['asked']}: perplexity at most {budget['limit']:.3f} (dense {found['dense']['ppl']:.3f})."]
    for row in budget["methods"]:
        point = row["found"]
        whole = sum(one["kind"] == "run" for one in row["tried"])
        tried = f"{len(row['tried']) - whole} put together from solved layers, {whole} whole runs"
        reached = "nothing is within it" if point is None else f"{point['amount']} at perplexity {point['ppl']:.3f}"
        said.append(f"{row['method']}: {reached} ({tried}).")
    best = budget["best"]
    if best is not None:
        left = best["params_after"] - best["zeros"]
        said.append(
            f"Smallest: {best['method']} {best['amount']}, {left:,} of {best['params_before']:,} parameters are left."
        )
    return said
