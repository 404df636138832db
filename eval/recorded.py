"""A model's measurements over several calls: what was recorded of other texts and tasks stays."""

from __future__ import annotations

from typing import Any


def joined(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The result `now` of `llmprune.evaluate`, with what an earlier one holds that was not measured again.

    Rows go by text and by task. Those of another baseline go: see `other_baseline`.
    """
    found = {"model": now["model"], **_rows(before, now, now)}
    kept = {} if other_baseline(before, now) else before
    dense = _rows(kept.get("baseline", {}), now.get("baseline", {}), now)
    if any(dense.values()):
        found["baseline"] = {"model": (now.get("baseline") or kept["baseline"])["model"], **dense}
        found["comparison"] = _rows(kept.get("comparison", {}), now.get("comparison", {}), now)
    return found


def other_baseline(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The dense model beside which an earlier result stands, if it is another one than now."""
    earlier = before.get("baseline", {}).get("model")
    return earlier if "baseline" in now and earlier != now["baseline"]["model"] else None


def _rows(old: dict[str, Any], new: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """The parts of `new`, and of `old` what is not `measured` now."""
    parts: dict[str, Any] = {}
    for part in ("perplexity", "tasks"):
        stay = {name: row for name, row in old.get(part, {}).items() if name not in measured.get(part, {})}
        if stay or part in new or part == "perplexity":  # which every result has
            parts[part] = {**stay, **new.get(part, {})}
    samples = (new if "generation" in measured else old).get("generation")
    return parts if samples is None else {**parts, "generation": samples}
