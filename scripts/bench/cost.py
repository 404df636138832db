"""Seconds that each solver takes for a square matrix, against its size, with a log-log plot.

Correlated random inputs, 4 tokens an input; the Gram matrix is there before the clock starts, its factors are not.
Methods take turns, and a solver is left out of larger sizes once one call has taken longer than `--limit`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import record
import torch

from llmprune.methods import make_method
from llmprune.statistics import GRAM, MOMENTS, Stats
from llmprune.types import Budget, Matrix

METHODS = ("magnitude", "wanda", "sparsegpt", "thanos", "admm", "alps", "obc")
SIZES = (512, 724, 1024, 1448, 2048, 2896, 4096)
AMOUNT = Budget(0.5)


def problem(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and inputs whose features are correlated, as bytes decide nothing about time but zeros do."""
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(4 * size, size, generator=generator)
    return torch.randn(size, size, generator=generator), x_TI + x_TI.roll(1, dims=1)


def seconds(name: str, weight_OI: torch.Tensor, x_TI: torch.Tensor) -> float:
    stats = Stats(x_TI.shape[1], frozenset({GRAM, MOMENTS}))
    stats.update(x_TI)
    started = time.perf_counter()
    make_method(name, {}).solve(Matrix("m", weight_OI), stats, AMOUNT)
    return time.perf_counter() - started


def plot(rows: list[dict[str, Any]]) -> None:
    import altair as alt

    axes = (alt.X("size:Q").scale(type="log", base=2), alt.Y("seconds:Q").scale(type="log"), alt.Color("method:N"))
    chart = alt.Chart(alt.Data(values=rows)).mark_line(point=True).encode(*axes)
    chart.properties(width=480, height=320).save(record.FOLDER / "cost.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--sizes", nargs="*", type=int, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=120, help="seconds of a call after which larger sizes are left")
    arguments = parser.parse_args()
    found: dict[str, dict[int, float]] = {name: {} for name in arguments.methods}
    left = list(arguments.methods)
    for size in arguments.sizes:
        weight_OI, x_TI = problem(size)
        times: dict[str, list[float]] = {name: [] for name in left}
        for _ in range(arguments.rounds):
            for name in left:
                times[name].append(seconds(name, weight_OI, x_TI))
        for name, taken in times.items():
            found[name][size] = statistics.median(taken)
        left = [name for name in left if found[name][size] < arguments.limit]
        print(size, {name: round(found[name][size], 3) for name in times}, flush=True)
    rows = [{"method": n, "size": size, "seconds": s} for n, sizes in found.items() for size, s in sizes.items()]
    heads = ["method", *map(str, arguments.sizes)]
    cells = [[n, *(f"{s[size]:.3g}" if size in s else "–" for size in arguments.sizes)] for n, s in found.items()]
    note = (
        f"\nSeconds (median of {arguments.rounds}, methods in turns) for an n x n matrix at 50 % zeros, float32, "
        f"{torch.get_num_threads()} threads. – where a smaller size took more than {arguments.limit:.0f} s. "
        "Plot: `cost.svg`.\n"
    )
    plot(rows)
    save = {"environment": record.environment(), "protocol": note.strip(), "results": rows}
    record.save("cost", save, record.table(heads, cells) + note)


if __name__ == "__main__":
    main()
