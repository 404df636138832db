"""What was asked of the GPU kernels beside what `gpu.py` and `gpu_model.py` have recorded; what is not recorded is owed.

    python scripts/bench/gpu_targets.py     # writes benchmarks/gpu-targets.md and .json

A ratio is the time of the other over ours. A target is met if the worst of its figures meets it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import record
from device import Row

OWED = "owed"


class Target(NamedTuple):
    """`bound`: the least that is asked, or with `at_most` the most. `figure`: of a row of the part, None to leave it out."""

    asked: str
    bound: float
    record: str
    part: str
    figure: Callable[[Row], float | None]
    at_most: bool = False


def ratio(other: str, *ours: str, **only: object) -> Callable[[Row], float | None]:
    """Time of `other` over the least of `ours`, in rows with these values: one, or any of a set."""

    def of(row: Row) -> float | None:
        if not all(row[key] in (value if isinstance(value, set) else {value}) for key, value in only.items()):
            return None
        return float(row[other] / min(row[name] for name in ours if name in row))

    return of


def both_models(rows: list[Row]) -> list[Row]:
    """The dense and the 2:4 row of `generate` as one."""
    by_model = {row["model"]: row for row in rows}
    return [{"dense": by_model["dense"], "2:4": by_model["2:4"]}] if {"dense", "2:4"} <= by_model.keys() else []


def of_dense(key: str) -> Callable[[Row], float | None]:
    """A figure of the 2:4 model over that of the dense one, in what `both_models` gives."""
    return lambda pair: float(pair["2:4"][key] / pair["dense"][key])


DECODE = ("cublas", "2:4 gluon", "2:4 triton")
MATRIX = {"outputs": 4096, "inputs": 14336}
PREFILL = ("cublas", "expand and multiply", "cusparselt")
TARGETS = [
    Target("Gram update, beside cuBLAS bf16 X'X", 1.6, "gpu", "gram", ratio("cublas bf16", "triton")),
    Target("Gram update, beside the references' float32", 25, "gpu", "gram", ratio("cublas fp32", "triton")),
    Target(
        "SparseGPT of one 8B layer beside the textbook, statistics and solving",
        20,
        "gpu_model",
        "layer",
        ratio("textbook", "ours", what="statistics and solving"),
    ),
    Target(
        "the same with both forward passes",
        20,
        "gpu_model",
        "layer",
        ratio("textbook", "ours", what="with both forward passes"),
    ),
    Target("8B shape by SparseGPT, seconds", 40, "gpu_model", "sparsegpt", lambda row: row["seconds"], at_most=True),
    Target("8B shape by Wanda, seconds", 20, "gpu_model", "wanda", lambda row: row["seconds"], at_most=True),
    Target(
        "SparseGPT beside llm-compressor, time per layer",
        10,
        "gpu_model",
        "peer",
        ratio("llm-compressor per layer", "ours per layer"),
    ),
    Target(
        "2:4 decode, 4096 x 14336, 1 to 8 tokens", 1.5, "gpu", "decode", ratio(*DECODE, **MATRIX, tokens={1, 2, 4, 8})
    ),
    Target(
        "2:4 decode, 4096 x 14336, 16 and 32 tokens", 1.4, "gpu", "decode", ratio(*DECODE, **MATRIX, tokens={16, 32})
    ),
    Target("2:4 decode, 4096 x 14336, 64 tokens", 1.2, "gpu", "decode", ratio(*DECODE, **MATRIX, tokens=64)),
    Target(
        "tokens per second of the 2:4 8B shape, beside dense",
        1.4,
        "gpu_model",
        "generate",
        lambda pair: float(pair["2:4"]["rate"].split()[0]) / float(pair["dense"]["rate"].split()[0]),
    ),
    Target("prefill, never slower than cuBLAS", 1.0, "gpu", "prefill", ratio(*PREFILL)),
    Target("prefill, 2048 tokens or more", 1.25, "gpu", "prefill", ratio(*PREFILL, tokens={2048, 8192})),
    Target(
        "bytes of the 2:4 model, of the dense one's", 0.63, "gpu_model", "generate", of_dense("bytes"), at_most=True
    ),
    Target(
        "bytes of its 2:4 matrices, of the dense ones'",
        0.5625,
        "gpu_model",
        "generate",
        of_dense("bytes of matrices"),
        at_most=True,
    ),
]


def verdicts(measured: dict[str, dict[str, Any]]) -> Iterator[Row]:
    """Every target with its worst and best figure; `measured`: the parts of each record."""
    for target in TARGETS:
        part = measured[target.record].get(target.part, {"rows": []})
        rows = both_models(part["rows"]) if target.part == "generate" else part["rows"]
        figures = sorted(one for row in rows if (one := target.figure(row)) is not None)
        bound = f"{'at most' if target.at_most else 'at least'} {target.bound:g}"
        if not figures:
            yield {"asked": target.asked, "bound": bound, "measured": OWED, "met": OWED, "when": "–"}
            continue
        met = figures[-1] <= target.bound if target.at_most else figures[0] >= target.bound
        yield {
            "asked": target.asked,
            "bound": bound,
            "measured": f"{figures[0]:.3g} … {figures[-1]:.3g}" if len(figures) > 1 else f"{figures[0]:.4g}",
            "met": "yes" if met else "no",
            "when": f"{part['environment']['date']}, {part['environment']['hardware']}",
        }


def main() -> None:
    measured = {name: record.load(name).get("measured", {}) for name in ("gpu", "gpu_model")}
    rows = list(verdicts(measured))
    check = measured["gpu"].get("check")
    passed = "owed" if check is None else f"passed on {check['environment']['date']}"
    text = f"Correctness on a GPU (`gpu.py check`): {passed}.\n\n" + record.table(
        list(rows[0]), [list(row.values()) for row in rows]
    )
    record.save("gpu-targets", {"environment": record.environment(), "targets": rows}, text)


if __name__ == "__main__":
    main()
