"""Is one model better than another on the same rows? Paired differences, and a test that fits the metric."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import stats

from llmprune.types import UserError


def paired(samples: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare lm-eval's samples of one task from two models, metric by metric.

    Raises UserError if the rows are not the same.
    """
    ours, theirs = _by_row(samples), _by_row(baseline)
    if ours.keys() != theirs.keys():
        raise UserError("the two models were measured on different rows; measure both in one call")
    found = {}
    for metric in samples[0]["metrics"]:
        pairs: list[tuple[Any, Any]] = [(ours[key].get(metric), theirs[key].get(metric)) for key in ours]
        # metrics over several values a row (word perplexity) have no difference row by row
        if all(isinstance(one, int | float) for pair in pairs for one in pair):
            # lm-eval's perplexity is the mean log likelihood only at the very end
            label = "log_likelihood" if metric == "perplexity" else metric
            found[label] = difference([float(one) for one, _ in pairs], [float(one) for _, one in pairs])
    return found


def _by_row(samples: list[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, Any]]:
    return {(row["doc_id"], row["filter"], row["doc_hash"]): row for row in samples}


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
