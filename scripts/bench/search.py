"""The sparsest models within a perplexity budget, and how each layer bears pruning, found by `llmprune search`.

Calibration: 32 sequences of 256 tokens of the first 85 % of the model's calibration text, seed 0. The search decides on
windows of 256 tokens of its last 15 %; the evaluation text is looked at once, for the models that were found.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import record
from quality import HELD_OUT, MODELS

import llmprune
from llmprune.progress import Reporter
from llmprune.report.searched import scan_table

METHODS = ("magnitude", "wanda", "sparsegpt")


def split(text: Path, folder: Path) -> tuple[str, str]:
    """SPECs of the first part and of the held-out end of a text."""
    whole = text.read_text(encoding="utf-8")
    cut = int(len(whole) * (1 - HELD_OUT))
    parts = {"first": whole[:cut], "end": whole[cut:]}
    for name, part in parts.items():
        (folder / f"{name}.txt").write_text(part, encoding="utf-8")
    return tuple(f"file:{folder / name}.txt" for name in parts)  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["tales-llama"])
    parser.add_argument("--budget", default="ppl<=1.05x")
    parser.add_argument("--windows", type=int, default=16)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    rows: list[list[str]] = []
    scans = ""
    for model in arguments.models:
        dense = record.SHARED / "models" / model
        evaluation = f"file:{record.SHARED / 'data' / f'{MODELS[model]}-eval.txt'}"
        with tempfile.TemporaryDirectory() as name:
            first, end = split(record.SHARED / "data" / f"{MODELS[model]}-calibration.txt", Path(name))
            found = llmprune.search(
                dense, out=Path(name) / "search", methods=list(METHODS), amounts=[0.5], scan=True,
                budget=arguments.budget, perplexity=end, max_windows=arguments.windows, calibration=first, samples=32,
                seqlen=256, reporter=Reporter(),
            )  # fmt: skip
            for method in found["budget"]["methods"]:
                point = method["found"]
                if point is None:
                    rows.append([model, method["method"], "none", "–", "–", "–", "–"])
                    continue
                out = Path(name) / method["method"]
                llmprune.prune(dense, out=out, method=method["method"], sparsity=float(point["amount"]),
                               calibration=first, samples=32, seqlen=256)  # fmt: skip
                measured = llmprune.evaluate(
                    out, baseline=dense, perplexity=evaluation, seqlen=256, max_windows=arguments.windows
                )
                method["evaluation"] = measured["comparison"]["perplexity"][evaluation]
                kinds = [row["kind"] for row in method["tried"]]
                rows.append(
                    [
                        model, method["method"], point["amount"], method["by_levels"] or "none",
                        f"{point['ppl'] / found['dense']['ppl']:.3f}", f"{method['evaluation']['ratio']:.3f}",
                        f"{kinds.count('levels')} + {kinds.count('run')}",
                    ]
                )  # fmt: skip
            heads, lines = scan_table(found)
            scans += f"\n{model}, each layer alone at 50 % (perplexity on the held-out end, times dense):\n\n"
            scans += record.table(heads, lines)
            text = json.dumps(found).replace(name, "OUT").replace(str(record.SHARED), "../shared")
            results[model] = json.loads(text)
        save(arguments, results, rows, scans)


def save(arguments: argparse.Namespace, results: dict[str, Any], rows: list[list[str]], scans: str) -> None:
    heads = [
        "model", "method", "sparsest within", "by layers alone", "× dense, held-out", "× dense, evaluation",
        "put together + whole runs",
    ]  # fmt: skip
    note = (
        f"\nBudget {arguments.budget}, sought among 5 % to 95 % in steps of 5 %. Calibration: 32 x 256 tokens of the first "
        f"85 % of the model's calibration text, seed 0; decided on {arguments.windows} windows of 256 tokens of its last "
        f"15 %; checked on {arguments.windows} windows of the evaluation text; float32.\n"
    )
    record.save(
        "search", {"environment": record.environment(), "results": results}, record.table(heads, rows) + note + scans
    )


if __name__ == "__main__":
    main()
