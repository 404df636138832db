"""The figures of a report, as Altair charts: the same for the page (interactive) and for papers (SVG, PNG)."""

from __future__ import annotations

import re
from typing import Any

import altair as alt

# Colour-blind safe, and readable on white and on black.
BLUE, ORANGE = "#4a7fd4", "#d9822b"
# Height of a row, in pixels.
ROW = 24
_LAYER = re.compile(r"\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.\d+\.|\[\d+\]$")


def place(name: str) -> tuple[int, str]:
    """Layer and role of a matrix: `model.layers.3.mlp.up_proj.weight` is (3, "mlp.up_proj"); -1 outside layers.

    The experts of a layer share one role.
    """
    name = _EXPERT.sub(lambda match: "" if match[0].startswith("[") else ".experts.", name)
    match = _LAYER.search(name)
    role = name[match.end() :] if match else name
    return (int(match[1]) if match else -1), role.removesuffix(".weight")


def figures(run: dict[str, Any]) -> dict[str, Any]:
    """The charts of one run: heat maps of error and zeros, zeros of each layer, tokens of experts, recoveries."""
    rows = []
    for tensor in run["tensors"]:
        layer, role = place(tensor["name"])
        count = tensor["shape"][0] * tensor["shape"][1]
        rows.append(
            {
                "matrix": tensor["name"], "layer": layer, "role": role, "weights": count, "zeros": tensor["achieved"],
                "sparsity": tensor["achieved"] / count, "error": tensor["error"], "tokens": tensor["tokens"],
            }
        )  # fmt: skip
    charts = {"Zeros by layer": _by_layer(rows)}
    if any(row["error"] is not None for row in rows):
        charts = {"Error by matrix": _heat(rows, "error", "error (share of output lost)", scheme="viridis"), **charts}
    if len({round(row["sparsity"], 3) for row in rows}) > 1:
        charts["Zeros by matrix"] = _heat(rows, "sparsity", "zeros (share)", scheme="blues")
    experts = [row for row in rows if row["tokens"] is not None and _EXPERT.search(row["matrix"])]
    if experts:
        charts["Tokens of each expert"] = _expert_load(experts)
    for number, entry in enumerate(run.get("recovery", []), 1):
        if len(entry.get("curve", [])) > 1:
            charts[f"Recovery {number}: {entry['recipe']['how']}"] = _curve(entry["curve"], entry["best_step"])
    return charts


def trade_off(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Perplexity against zeros, a point a run, for the first text that several runs were measured on."""
    points = [
        {"run": run["name"], "method": run["recipe"]["method"], "text": spec, "ppl": row["ppl"],
         "zeros": run["totals"]["zeros"] / run["totals"]["params_after"], "params": run["totals"]["params_after"]}
        for run in runs
        for spec, row in run.get("evaluation", {}).get("perplexity", {}).items()
    ]  # fmt: skip
    for run in runs:
        baseline = run.get("evaluation", {}).get("baseline", {"perplexity": {}})
        for spec, row in baseline["perplexity"].items():
            params = run["totals"]["params_before"]
            point = {"run": "dense", "method": "dense", "text": spec, "ppl": row["ppl"], "zeros": 0.0, "params": params}
            if point not in points:
                points.append(point)
    specs = [point["text"] for point in points if point["method"] != "dense"]
    shared = next((spec for spec in specs if specs.count(spec) > 1), None)
    if shared is None:
        return {}
    chosen = [{**point, "front": _on_front(point, points)} for point in points if point["text"] == shared]
    base = alt.Chart(alt.Data(values=chosen)).encode(
        x=alt.X("zeros:Q", title="zeros (share of all parameters)", axis=alt.Axis(format="%")),
        y=alt.Y("ppl:Q", title="perplexity", scale=alt.Scale(zero=False)),
    )
    line = base.transform_filter("datum.front").mark_line(color="#888", strokeDash=[4, 3])
    dots = base.mark_circle(size=120).encode(
        color=alt.Color("method:N", scale=alt.Scale(scheme="tableau10"), legend=alt.Legend(orient="top")),
        tooltip=[
            "run:N",
            "method:N",
            alt.Tooltip("ppl:Q", format=".3f"),
            alt.Tooltip("zeros:Q", format=".1%"),
            "params:Q",
        ],
    )
    return {"Perplexity against zeros": (line + dots).properties(width="container", height=320)}


def _on_front(point: dict[str, Any], points: list[dict[str, Any]]) -> bool:
    """Whether no other run on the same text has at least as many zeros at a lower perplexity."""
    others = (one for one in points if one["text"] == point["text"] and one is not point)
    return not any(one["zeros"] >= point["zeros"] and one["ppl"] < point["ppl"] for one in others)


def _heat(rows: list[dict[str, Any]], field: str, title: str, scheme: str) -> alt.Chart:
    """A cell a layer and role: the mean over its matrices (experts), weighted by their size."""
    cells: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row[field] is not None:
            cells.setdefault((row["layer"], row["role"]), []).append(row)
    values = []
    for (layer, role), members in cells.items():
        weights = sum(one["weights"] for one in members)
        mean = sum(one[field] * one["weights"] for one in members) / weights
        values.append({"layer": layer, "role": role, "value": mean, "matrices": len(members), "weights": weights})
    positive = all(one["value"] > 0 for one in values)
    scale = alt.Scale(scheme=scheme, type="log") if field == "error" and positive else alt.Scale(scheme=scheme)
    return (
        alt.Chart(alt.Data(values=values))
        .mark_rect()
        .encode(
            x=alt.X("layer:O", title="layer", axis=alt.Axis(labelOverlap=True, labelAngle=0)),
            y=alt.Y("role:N", title=None, sort=None),
            color=alt.Color(
                "value:Q", title=title, scale=scale, legend=alt.Legend(orient="top", gradientLength=200, format=".2g")
            ),
            tooltip=["role:N", "layer:O", alt.Tooltip("value:Q", title=field, format=".3g"), "matrices:Q", "weights:Q"],
        )
        .properties(width="container", height=ROW * len({role for _, role in cells}))
    )


def _curve(curve: list[dict[str, Any]], best_step: int) -> alt.LayerChart:
    """Held-out perplexity of a training; the weights that were kept are marked."""
    values = [{**row, "kept": row["step"] == best_step} for row in curve]
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X("step:Q", title="step"),
        y=alt.Y("perplexity:Q", title="held-out perplexity", scale=alt.Scale(zero=False)),
        tooltip=["step:Q", alt.Tooltip("perplexity:Q", format=".3f")],
    )
    best = base.transform_filter("datum.kept").mark_point(color=ORANGE, filled=True, size=90)
    return (base.mark_line(color=BLUE, point=True) + best).properties(width="container", height=220)


def _by_layer(rows: list[dict[str, Any]]) -> alt.Chart:
    totals: dict[int, list[int]] = {}
    for row in rows:
        pair = totals.setdefault(row["layer"], [0, 0])
        pair[0] += row["zeros"]
        pair[1] += row["weights"]
    values = [
        {"layer": layer, "sparsity": zeros / weights, "zeros": zeros} for layer, (zeros, weights) in totals.items()
    ]
    return (
        alt.Chart(alt.Data(values=values))
        .mark_bar(color=BLUE)
        .encode(
            x=alt.X("layer:O", title="layer", axis=alt.Axis(labelOverlap=True, labelAngle=0)),
            y=alt.Y(
                "sparsity:Q",
                title="zeros in pruned matrices",
                axis=alt.Axis(format="%"),
                scale=alt.Scale(domain=[0, 1]),
            ),
            tooltip=["layer:O", alt.Tooltip("sparsity:Q", format=".1%"), "zeros:Q"],
        )
        .properties(width="container", height=220)
    )


def _expert_load(rows: list[dict[str, Any]]) -> alt.Chart:
    values = [{"layer": row["layer"], "matrix": row["matrix"], "tokens": row["tokens"]} for row in rows]
    return (
        alt.Chart(alt.Data(values=values))
        .mark_tick(color=ORANGE, thickness=2)
        .encode(
            x=alt.X("tokens:Q", title="calibration tokens that reached the expert"),
            y=alt.Y("layer:O", title="layer"),
            tooltip=["matrix:N", "tokens:Q"],
        )
        .properties(width="container", height=ROW * len({row["layer"] for row in rows}))
    )
