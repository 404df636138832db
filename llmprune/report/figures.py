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
    """The charts of one run: heat maps of error and zeros, zeros of each layer, tokens of each expert, scores of layers
    and experts, and how a recovery went.
    """
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
    charts: dict[str, Any] = {"Zeros by layer": _by_layer(rows)} if rows else {}
    if any(row["error"] is not None for row in rows):
        charts = {"Error by matrix": _heat(rows, "error", "error (share of output lost)", scheme="viridis"), **charts}
    shares = [row["sparsity"] for row in rows]
    # less is rounding to whole weights
    if rows and max(shares) - min(shares) > 0.01:
        charts["Zeros by matrix"] = _heat(rows, "sparsity", "zeros (share)", scheme="blues")
    experts = [row for row in rows if row["tokens"] is not None and _EXPERT.search(row["matrix"])]
    if experts:
        charts["Tokens of each expert"] = _expert_load(experts)
    for number, stage in enumerate(run.get("stages", [run]), 1):
        structure, which = stage.get("structure", {}), f" (stage {number})" if "stages" in run else ""
        if structure.get("scores"):
            charts[f"Scores of what could go{which}"] = _scores(structure["scores"], stage["recipe"]["method"])
        if "similarity" in structure.get("figures", {}):
            charts[f"Similarity of hidden states{which}"] = _similarity(structure["figures"]["similarity"])
        if "expert_tokens" in structure.get("figures", {}):
            charts[f"Tokens of each expert{which}"] = _expert_load(
                [
                    {"layer": int(layer), "matrix": f"expert {expert}", "tokens": count}
                    for layer, counts in structure["figures"]["expert_tokens"].items()
                    for expert, count in enumerate(counts)
                ]
            )
    for number, recovery in enumerate(run.get("recovery", []), 1):
        if recovery.get("curve"):
            charts["Recovery" + (f" {number}" if len(run["recovery"]) > 1 else "")] = _training(recovery)
    return charts


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


def _scores(rows: list[dict[str, Any]], method: str) -> alt.Chart:
    """The score of every layer, or of every part or expert of it, and whether it went."""
    values = []
    for row in rows:
        unit, _, part = row["name"].partition(" ")
        layer = int(re.findall(r"\d+", unit)[-1])
        gone = "goes" if row["dropped"] else "stays"
        values.append(
            {"layer": layer, "part": part or "layer", "score": row["score"], "what": gone, "saved": row["saved"]}
        )
    return (
        alt.Chart(alt.Data(values=values))
        .mark_point(filled=True, size=70, opacity=0.9)
        .encode(
            x=alt.X("layer:O", title="layer", axis=alt.Axis(labelOverlap=True, labelAngle=0)),
            y=alt.Y("score:Q", title=f"score ({method})", scale=alt.Scale(zero=False)),
            color=alt.Color(
                "what:N",
                title=None,
                scale=alt.Scale(domain=["stays", "goes"], range=[BLUE, ORANGE]),
                legend=alt.Legend(orient="top"),
            ),
            shape=alt.Shape("what:N", legend=None),
            tooltip=["layer:O", "part:N", alt.Tooltip("score:Q", format=".4g"), "what:N", "saved:Q"],
        )
        .properties(width="container", height=220)
    )


def _similarity(cosines: list[list[float]]) -> alt.Chart:
    """The cosine of every pair of hidden states; state k enters layer k, the last one leaves the last layer."""
    values = [
        {"first": first, "second": second, "cosine": cosine}
        for first, row in enumerate(cosines)
        for second, cosine in enumerate(row)
    ]
    return (
        alt.Chart(alt.Data(values=values))
        .mark_rect()
        .encode(
            x=alt.X("first:O", title="hidden state before layer", axis=alt.Axis(labelOverlap=True, labelAngle=0)),
            y=alt.Y("second:O", title="hidden state before layer", axis=alt.Axis(labelOverlap=True)),
            color=alt.Color(
                "cosine:Q",
                title="cosine",
                scale=alt.Scale(scheme="viridis"),
                legend=alt.Legend(orient="top", gradientLength=200, format=".2g"),
            ),
            tooltip=["first:O", "second:O", alt.Tooltip("cosine:Q", format=".3f")],
        )
        .properties(width="container", height=min(max(ROW * len(cosines), 120), 480))
    )


def _training(recovery: dict[str, Any]) -> alt.LayerChart:
    """Loss of the training text and perplexity of the held-out text by step; the step that was kept is marked."""
    best = recovery.get("best_step")
    values = [{**point, "kept": point["step"] == best} for point in recovery["curve"]]
    base = alt.Chart(alt.Data(values=values)).encode(x=alt.X("step:Q", title="step"))
    loss = (
        base.transform_filter("isValid(datum.loss)")
        .mark_line(color=BLUE)
        .encode(y=alt.Y("loss:Q", title="training loss", axis=alt.Axis(titleColor=BLUE), scale=alt.Scale(zero=False)))
    )
    held = base.encode(
        y=alt.Y(
            "perplexity:Q", title="held-out perplexity", axis=alt.Axis(titleColor=ORANGE), scale=alt.Scale(zero=False)
        ),
        tooltip=["step:Q", alt.Tooltip("perplexity:Q", format=".3f"), alt.Tooltip("loss:Q", format=".4f"), "kept:N"],
    )
    dots = held.mark_point(filled=True, color=ORANGE).encode(
        size=alt.Size("kept:N", scale=alt.Scale(domain=[False, True], range=[40, 160]), legend=None)
    )
    both = alt.layer(held.mark_line(color=ORANGE), dots)
    return alt.layer(loss, both).resolve_scale(y="independent").properties(width="container", height=240)
