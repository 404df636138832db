"""Time the GPU kernels beside cuBLAS, on the shapes of Llama 3 8B and 70B, in parts of a few minutes each.

    python scripts/bench/gpu.py gram moments solve decode prefill

Needs a CUDA GPU and triton. Each part first checks its results against float64 or the torch form and stops if they are
wrong. Times are medians of CUDA graph replays with the L2 cache flushed in between. Parts that ran are kept in
benchmarks/gpu.json.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import record
import torch

from llmprune import masks
from llmprune.kernels import bitmask, eligibility, gram, moments, overflow, sparse24
from llmprune.methods.weight.sparsegpt import SparseGPT
from llmprune.statistics import Stats
from llmprune.types import Budget, Matrix, Pattern

# Outputs x inputs of the matrices of Llama 3 8B (q and o, k and v, gate and up, down), then 70B.
SHAPES = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192), (8192, 28672)]
# q, k and v, and gate and up, of the 8B as one matrix each.
JOINED = [(6144, 4096), (28672, 4096)]
TOKENS = [1, 2, 4, 8, 16, 32, 64]
DEVICE = "cuda"
FLUSH_BYTES = 256 * 2**20

Row = dict[str, Any]


def seconds(function: Callable[..., Any], *operands: Any) -> float:
    """Median seconds of one call: captured as a CUDA graph, L2 flushed before every replay."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function(*operands)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function(*operands)
    return _median(graph.replay)


def seconds_eager(function: Callable[..., Any], *operands: Any, repeats: int = 5) -> float:
    """Median seconds of a call that cannot be captured (it copies to or from the host); its launch counts too."""
    function(*operands)
    return _median(lambda: function(*operands), repeats)


def _median(function: Callable[[], Any], repeats: int = 50) -> float:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=DEVICE)
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)


def dense_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight.T


def widened_gram(lower: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return lower.addmm_(x.float().T, x.float())


def update_moments(x: torch.Tensor) -> None:
    moments.Moments(x.shape[1], DEVICE).update(x)


def solve(matrix: Matrix, stats: Stats, budget: Budget) -> float:
    """SparseGPT of one matrix; the factorization is made anew."""
    stats._derived.clear()
    loss = SparseGPT().solve(matrix, stats, budget).loss
    assert loss is not None
    return loss


@contextlib.contextmanager
def asked(setting: str) -> Iterator[None]:
    """Only these implementations, whatever the rule says."""
    os.environ["LLMPRUNE_KERNELS"] = setting
    try:
        yield
    finally:
        del os.environ["LLMPRUNE_KERNELS"]


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def two_of_four(outputs: int, inputs: int) -> torch.Tensor:
    dense = random(outputs, inputs)
    return dense.masked_fill(masks.lowest_per_group(dense.float().abs(), 2, 4), 0)


def half_zero(outputs: int, inputs: int, sparsity: float) -> torch.Tensor:
    return random(outputs, inputs).masked_fill(torch.rand(outputs, inputs, device=DEVICE) < sparsity, 0)


def check_product(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, base: torch.Tensor | None = None) -> None:
    """One rounding to the result's dtype, one more for the product with a `base` that is added to, and of the sums."""
    exact = x.double() @ weight.double().T
    rounded = exact.abs() if base is None else exact.abs() + (x.double() @ base.double().T).abs()
    sums = x.shape[1] * torch.finfo(torch.float32).eps * (x.double().abs() @ weight.double().abs().T)
    if bool(((found.double() - exact).abs() > torch.finfo(x.dtype).eps * rounded + sums).any()):
        sys.exit(f"the product of {tuple(x.shape)} and {tuple(weight.shape)} is wrong; no time is worth taking")


# The parts.


def part_gram(quick: bool) -> Iterator[Row]:
    for width, tokens in [(256, 512)] if quick else [(4096, 8192), (14336, 8192), (8192, 8192)]:
        x = random(tokens, width)
        lower = torch.zeros(width, width, device=DEVICE)
        with asked("gram_update=triton"):
            gram.gram_update_(lower, x)
            exact = x[:, :128].double().T @ x[:, :128].double()
            scale = x[:, :128].double().abs().T @ x[:, :128].double().abs()
            wrong = (lower[:128, :128].double() - exact).abs().tril() > tokens * torch.finfo(torch.float32).eps * scale
            if bool(wrong.any()):
                sys.exit(f"the Gram matrix of width {width} is wrong")
            ours = seconds_eager(gram.gram_update_, lower, x, repeats=20)
        dense = seconds(dense_product, x.T, x.T)
        widened = seconds_eager(widened_gram, lower, x)
        yield {"width": width, "tokens": tokens, "triton": ours, "cublas bf16": dense, "cublas fp32": widened}


def part_moments(quick: bool) -> Iterator[Row]:
    x = random(512 if quick else 8192, 256 if quick else 4096)
    times = {}
    for name in ("triton", "torch"):
        with asked(f"column_moments={name}"):
            times[name] = seconds_eager(update_moments, x, repeats=20)
    yield {"tokens": len(x), "width": x.shape[1], **times}


def part_solve(quick: bool) -> Iterator[Row]:
    """One matrix by SparseGPT, statistics given."""
    for outputs, inputs in [(256, 512)] if quick else [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]:
        stats = Stats(inputs, SparseGPT.needs, DEVICE)
        stats.update(random(4 * inputs, inputs))
        matrix = Matrix("weight", random(outputs, inputs, dtype=torch.float32))
        for budget in (Budget.of(None, Pattern(2, 4)), Budget(0.5)):
            times, sums = {}, {}
            for name in ("triton", "torch"):
                with asked(f"sparsegpt_block={name}"):
                    sums[name] = solve(matrix, stats, budget)
                    times[name] = seconds_eager(solve, matrix, stats, budget, repeats=3 if name == "triton" else 1)
            if abs(sums["triton"] - sums["torch"]) > 1e-3 * sums["torch"]:
                sys.exit(f"the losses of {outputs} x {inputs} differ: {sums}")
            yield {"outputs": outputs, "inputs": inputs, "amount": str(budget.pattern), **times}


def part_decode(quick: bool) -> Iterator[Row]:
    for outputs, inputs in [(256, 512)] if quick else SHAPES + JOINED:
        weight = two_of_four(outputs, inputs)
        packed = sparse24.pack24(weight)
        masked = {share: half_zero(outputs, inputs, share) for share in (0.5, 0.7)}
        stored = {share: bitmask.pack_bitmask(one) for share, one in masked.items()}
        beside = {share: overflow.pack_overflow(one) for share, one in masked.items()}
        for tokens in TOKENS:
            x = random(tokens, inputs)
            row = {}
            for name in ("gluon", "triton"):
                with asked(f"matmul24={name}"):
                    # random masks hold all six pairs of places: a wrong reading of the metadata cannot pass
                    check_product(sparse24.matmul24(x, *packed), x, weight)
                    row[f"2:4 {name}"] = seconds(sparse24.matmul24, x, *packed)
            with asked("matmul_bitmask=triton"):
                for share, one in stored.items():
                    check_product(bitmask.matmul_bitmask(x, one), x, masked[share])
                    row[f"bitmask {share:.0%}"] = seconds(bitmask.matmul_bitmask, x, one)
            with asked("matmul_overflow=triton,matmul24=gluon"):
                for share, one in beside.items() if tokens <= eligibility.OVERFLOW_TOKENS else ():
                    base = sparse24.unpack24(one.values_OV, one.metadata_OB)
                    check_product(overflow.matmul_overflow(x, one), x, masked[share], base)
                    row[f"2:4 and surplus {share:.0%}"] = seconds(overflow.matmul_overflow, x, one)
            dense = seconds(dense_product, x, weight)
            yield {"outputs": outputs, "inputs": inputs, "tokens": tokens, "cublas": dense, **row}


def part_prefill(quick: bool) -> Iterator[Row]:
    """More tokens than the decode kernel takes: the matrix is expanded, then cuBLAS multiplies; or cuSPARSELt."""
    shapes = [(256, 512)] if quick else SHAPES[:4] + JOINED
    for (outputs, inputs), tokens in itertools.product(shapes, [128, 512, 2048, 8192]):
        weight, x = two_of_four(outputs, inputs), random(tokens, inputs)
        packed = sparse24.pack24(weight)
        with asked("matmul24=triton,unpack24=triton"):
            check_product(sparse24.matmul24(x, *packed), x, weight)
            expand = seconds(sparse24.unpack24, *packed)
            ours = seconds(sparse24.matmul24, x, *packed)
        compressed = sparse24.compress24(weight)
        with asked("matmul24=cusparselt"):
            check_product(sparse24.matmul24(x, *packed, compressed), x, weight)
            library = seconds(sparse24.matmul24, x, *packed, compressed)
        dense = seconds(dense_product, x, weight)
        shape = {"outputs": outputs, "inputs": inputs, "tokens": tokens}
        yield {**shape, "expand": expand, "expand and multiply": ours, "cusparselt": library, "cublas": dense}


PARTS = {
    "gram": part_gram,
    "moments": part_moments,
    "solve": part_solve,
    "decode": part_decode,
    "prefill": part_prefill,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, nothing written: does the script run?")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA GPU here, and times from anywhere else would say nothing")
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    path = record.FOLDER / "gpu.json"
    measured = json.loads(path.read_text())["measured"] if path.is_file() else {}
    for name in arguments.parts:
        rows = []
        for row in PARTS[name](arguments.quick):
            rows.append(row)
            print(name, row, flush=True)
        measured[name] = {"environment": record.environment("triton"), "rows": rows}
    if not arguments.quick:
        text = "".join(f"## {name}\n\n{_table(one['rows'])}\n" for name, one in measured.items())
        record.save("gpu", {"environment": record.environment("triton"), "measured": measured}, text)


def _table(rows: list[Row]) -> str:
    heads = list(rows[0])
    cells = [
        [f"{row[key] * 1e6:.1f} us" if isinstance(row[key], float) else str(row[key]) for key in heads] for row in rows
    ]
    return record.table(heads, cells)


if __name__ == "__main__":
    main()
