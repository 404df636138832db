"""Is one model better than another on the same rows? Paired differences, and a test that fits the metric."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import stats

from llmprune.types import UserError


def paired(samples: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare lm-eval's samples of one task from two models, by metric and filter (see `label`).

    `of` says what was compared in the place of a metric that no single row has.
    Raises UserError if the rows are not the same.
    """
    ours, theirs = _by_filter(samples), _by_filter(baseline)
    if {name: rows.keys() for name, rows in ours.items()} != {name: rows.keys() for name, rows in theirs.items()}:
        raise UserError("the two models were measured on different rows; measure both in one call")
    found = {}
    for name, rows in ours.items():
        for metric in next(iter(rows.values()))["metrics"]:
            pairs: list[tuple[Any, Any]] = [
                (row.get(metric), theirs[name][key].get(metric)) for key, row in rows.items()
            ]
            # metrics over several values a row (word perplexity) have no difference row by row
            if all(isinstance(one, int | float) for pair in pairs for one in pair):
                test = difference([float(one) for one, _ in pairs], [float(one) for _, one in pairs])
                # lm-eval's perplexity is the exponential of a mean only at the very end
                of = {"of": "log likelihood"} if metric == "perplexity" else {}
                found[label(metric, name)] = test | of
    return found


def label(metric: str, filtered: str) -> str:
    """A metric of the answers that a filter of lm-eval gave, by the name that results and comparisons have for it."""
    return metric if filtered == "none" else f"{metric}[{filtered}]"


def _by_filter(samples: list[dict[str, Any]]) -> dict[str, dict[tuple[Any, ...], dict[str, Any]]]:
    """Rows by their document, apart for each filter: it answers every document once more."""
    found: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {}
    for row in samples:
        found.setdefault(row["filter"], {})[row["doc_id"], row["doc_hash"]] = row
    return found


def difference(values: list[float], baseline: list[float]) -> dict[str, Any]:
    """Mean difference `values - baseline`, its standard error, and a two-sided p.

    Right or wrong (0 and 1): the exact McNemar test, a binomial test on the rows where the two disagree.
    Anything else: the paired t test. p is 1 where nothing differs, None where there is no spread to test against.
    """
    change = np.asarray(values) - np.asarray(baseline)
    n = len(change)
    stderr = float(change.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    p: float | None
    if set(values) | set(baseline) <= {0.0, 1.0}:
        better, worse = int((change > 0).sum()), int((change < 0).sum())
        p = float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0
        return {
            "delta": float(change.mean()), "stderr": stderr, "p": p, "test": "McNemar, exact",
            "n": n, "better": better, "worse": worse,
        }  # fmt: skip
    if not change.any():
        p = 1.0
    else:
        # without spread (or with one row) there is nothing to test against
        p = float(stats.ttest_rel(values, baseline).pvalue) if stderr else None
    return {"delta": float(change.mean()), "stderr": stderr, "p": p, "test": "paired t", "n": n}
