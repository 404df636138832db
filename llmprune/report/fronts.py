"""Figures about several models: perplexity against what each costs, and how layers bear being pruned alone."""

from __future__ import annotations

from typing import Any

import altair as alt

from llmprune.report.figures import ROW
from llmprune.report.front import COSTS, front
from llmprune.report.searched import scan_points, sweep_points


def search_figures(found: dict[str, Any]) -> dict[str, Any]:
    """The charts of a search."""
    charts = trade_offs(sweep_points(found))
    if "scan" in found:
        charts["Each layer alone"] = _scan(scan_points(found))
    return charts


def trade_offs(points: list[dict[str, Any]]) -> dict[str, Any]:
    """Perplexity against each cost in which the models differ. `points`: see `searched.sweep_points`."""
    charts = {}
    for key, cost in COSTS.items():
        known = [point for point in points if key in point]
        if len({point[key] for point in known}) > 1 and len(known) > 2:
            charts[f"Perplexity against {cost.name}"] = _trade_off(known, key)
    return charts


def _trade_off(points: list[dict[str, Any]], key: str) -> alt.LayerChart:
    on_front = front((point["ppl"], point[key]) for point in points)
    values = [{**point, "front": best} for point, best in zip(points, on_front, strict=True)]
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X(f"{key}:Q", title=COSTS[key].title, axis=alt.Axis(format="%"), scale=alt.Scale(zero=False)),
        y=alt.Y("ppl:Q", title="perplexity", scale=alt.Scale(zero=False)),
    )
    line = base.transform_filter("datum.front").mark_line(color="#888", strokeDash=[4, 3])
    dots = base.mark_point(filled=True, size=110).encode(
        color=alt.Color("method:N", scale=alt.Scale(scheme="tableau10"), legend=alt.Legend(orient="top")),
        shape=alt.Shape("method:N"),
        tooltip=[
            alt.Tooltip("label:N", title="model"),
            alt.Tooltip("ppl:Q", title="perplexity", format=".3f"),
            alt.Tooltip(f"{key}:Q", title=COSTS[key].name, format=".1%"),
            alt.Tooltip("params:Q", title="parameters", format=","),
            alt.Tooltip("zeros:Q", format=","),
        ],
    )
    return (line + dots).properties(width="container", height=320)


def _scan(points: list[dict[str, Any]]) -> alt.Chart:
    """A cell a layer and treatment: by how much perplexity rises."""
    values = [{**point, "rise": point["ratio"] - 1} for point in points]
    return (
        alt.Chart(alt.Data(values=values))
        .mark_rect()
        .encode(
            x=alt.X("layer:O", title="layer", axis=alt.Axis(labelOverlap=True, labelAngle=0)),
            y=alt.Y("done:N", title=None, sort=None),
            color=alt.Color(
                "rise:Q",
                title="rise of perplexity over dense",
                scale=alt.Scale(scheme="viridis"),
                legend=alt.Legend(orient="top", gradientLength=200, format=".1%"),
            ),
            tooltip=[
                alt.Tooltip("done:N", title="pruned by"),
                "layer:O",
                alt.Tooltip("ppl:Q", title="perplexity", format=".3f"),
                alt.Tooltip("rise:Q", format=".2%"),
            ],
        )
        .properties(width="container", height=ROW * len({point["done"] for point in points}))
    )
