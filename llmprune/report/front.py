"""Which of several models no other beats on both quality and cost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple


class Cost(NamedTuple):
    """What a smaller model has less of, as a share of the dense model's."""

    name: str
    title: str


COSTS = {
    "nonzero": Cost("non-zero parameters", "non-zero parameters (share of dense)"),
    "parameters": Cost("parameters", "parameters (share of dense)"),
    "prefill": Cost("prefill time", "time to the first token (share of dense)"),
    "decode": Cost("decoding time", "time of each later token (share of dense)"),
}


def costs(row: dict[str, Any]) -> dict[str, float]:
    """The costs of a model by their keys in `COSTS`; `row` has its parameters and zeros, and times if measured."""
    found = {
        "nonzero": (row["params_after"] - row["zeros"]) / row["params_before"],
        "parameters": row["params_after"] / row["params_before"],
    }
    for what in ("prefill", "decode") if "latency" in row else ():
        found[what] = row["latency"]["pruned"][what] / row["latency"]["dense"][what]
    return found


def front(points: Iterable[tuple[float, float]]) -> list[bool]:
    """For each point (perplexity, cost), whether no other is as good in both and better in one."""
    listed = list(points)
    return [not any(q <= p and d <= c and (q, d) != (p, c) for q, d in listed) for p, c in listed]
