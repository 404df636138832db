"""The device that is measured: its clock, random matrices on it, the choice of implementations, records of parts.

Without a GPU everything runs on the CPU too, so that a script can be tried there; its times say nothing.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import record
import torch

from llmprune import masks
from llmprune.kernels import dispatch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLUSH_BYTES = 256 * 2**20
# What the GPU sleeps while the host launches: half a millisecond at 2 GHz.
SLEEP_CYCLES = 1_000_000

Row = dict[str, Any]


def need_gpu(*, quick: bool) -> None:
    """Exit where a GPU is needed and there is none."""
    if not quick and DEVICE.type != "cuda":
        sys.exit(
            "there is no CUDA GPU here, and times from anywhere else would say nothing; --quick only tries the script"
        )


# Time.


def seconds(function: Callable[..., Any], *operands: Any) -> float:
    """Median seconds of one call: captured as a CUDA graph, L2 flushed before every replay."""
    if DEVICE.type == "cpu":
        return once(function, *operands)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function(*operands)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function(*operands)
    return _median(graph.replay, 50)


def seconds_eager(function: Callable[..., Any], *operands: Any, repeats: int = 5) -> float:
    """Median seconds of a call that cannot be captured: what it waits for on the host counts, launches do not."""
    function(*operands)
    if DEVICE.type == "cpu":
        return once(function, *operands)
    return _median(lambda: function(*operands), repeats)


def once(function: Callable[..., Any], *operands: Any, **settings: Any) -> float:
    """Seconds of one call by the clock on the wall, until the device has done it."""
    wait()
    started = time.perf_counter()
    function(*operands, **settings)
    wait()
    return time.perf_counter() - started


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _median(function: Callable[[], Any], repeats: int) -> float:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=DEVICE)
    times = []
    for _ in range(repeats):
        flush.zero_()
        torch.cuda._sleep(SLEEP_CYCLES)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)


# Implementations.


@contextlib.contextmanager
def asked(setting: str) -> Iterator[None]:
    """Only these implementations, whatever the rule says."""
    os.environ["LLMPRUNE_KERNELS"] = setting
    try:
        yield
    finally:
        del os.environ["LLMPRUNE_KERNELS"]


def here(operation: str) -> list[str]:
    """The implementations of an operation that can run on this device; says why where one cannot."""
    names = []
    for one in dispatch.TABLE[operation]:
        reason = one.machine(DEVICE)
        if reason is None:
            names.append(one.name)
        else:
            print(f"{operation}={one.name} is left out: {reason}", flush=True)
    return names


# Matrices.


# Triton's interpreter computes on the bit patterns of bfloat16: where it stands in for a GPU, halves are float16.
HALF = torch.float16 if os.environ.get("TRITON_INTERPRET") == "1" else torch.bfloat16


def random(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def two_of_four(outputs: int, inputs: int) -> torch.Tensor:
    dense = random(outputs, inputs)
    return dense.masked_fill(masks.lowest_per_group(dense.float().abs(), 2, 4), 0)


def some_zero(outputs: int, inputs: int, sparsity: float) -> torch.Tensor:
    return random(outputs, inputs).masked_fill(torch.rand(outputs, inputs, device=DEVICE) < sparsity, 0)


# Records.


def run_parts(name: str, parts: dict[str, Iterator[Row]], head: str, *, quick: bool) -> None:
    """Run parts one after the other; every row is kept at once in `benchmarks/NAME.json`, beside parts of other days."""
    for part, rows in parts.items():
        done = []
        for row in rows:
            done.append(row)
            print(part, row, flush=True)
            if not quick:
                environment = record.environment("triton")
                measured = record.load(name).get("measured", {}) | {part: {"environment": environment, "rows": done}}
                text = head + "".join(_section(title, one) for title, one in measured.items())
                record.save(name, {"environment": environment, "measured": measured}, text, echo=False)


def _section(title: str, part: dict[str, Any]) -> str:
    rows, where = part["rows"], part["environment"]
    heads = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(key, "–")) for key in heads] for row in rows]
    versions = ", ".join(f"{key} {value}" for key, value in where["versions"].items())
    return f"## {title}\n\n{where['date']}; {where['hardware']}; {versions}.\n\n{record.table(heads, cells)}\n"


def _cell(value: object) -> str:
    """Seconds are floats; every other figure says what it is by its head."""
    if not isinstance(value, float):
        return str(value)
    return f"{value * 1e6:.1f} us" if value < 0.1 else f"{value:.2f} s"
