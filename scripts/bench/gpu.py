"""Time the GPU kernels beside cuBLAS, on the shapes of Llama 3 8B and 70B, in parts of a few minutes each.

    python scripts/bench/gpu.py check                              # first: is everything right? pytest must be installed
    python scripts/bench/gpu.py gram moments solve decode prefill
    python scripts/bench/gpu_targets.py                            # what was asked for beside what was measured

Needs a CUDA GPU and triton. `check` runs the tests of the kernels on the GPU, that of the metadata of `mma.sp` first;
no other part runs before it has passed with the same GPU and versions. Besides, each part checks its own results
against float64 or the torch form, and stops if they are wrong. Times are medians of CUDA graph replays with the L2 cache
flushed in between. Parts that ran are kept in benchmarks/gpu.json with their dates.

`--quick` runs tiny shapes and writes nothing; with TRITON_INTERPRET=1 it also runs without a GPU, and leaves out what
the interpreter cannot do: it shows that the script runs, no more.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import record
import torch
from device import (
    DEVICE,
    Row,
    asked,
    here,
    need_gpu,
    random,
    run_parts,
    seconds,
    seconds_eager,
    some_zero,
    two_of_four,
)

from llmprune.kernels import bitmask, eligibility, gram, moments, overflow, sparse24
from llmprune.methods.weight.sparsegpt import SparseGPT
from llmprune.statistics import Stats
from llmprune.types import Budget, Matrix, Pattern

# Outputs x inputs of the matrices of Llama 3 8B (q and o, k and v, gate and up, down), then 70B.
SHAPES = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192), (8192, 28672)]
# q, k and v, and gate and up, of the 8B as one matrix each.
JOINED = [(6144, 4096), (28672, 4096)]
TOKENS = [1, 2, 4, 8, 16, 32, 64]
TINY = (32, 128)
# In this order: whether the emulator of `mma.sp` tells the truth comes first.
TESTS = ("tests/test_mma_sp.py", "tests/test_triton.py")


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


def check_product(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, base: torch.Tensor | None = None) -> None:
    """One rounding to the result's dtype, one more for the product with a `base` that is added to, and of the sums."""
    exact = x.double() @ weight.double().T
    rounded = exact.abs() if base is None else exact.abs() + (x.double() @ base.double().T).abs()
    sums = x.shape[1] * torch.finfo(torch.float32).eps * (x.double().abs() @ weight.double().abs().T)
    if bool(((found.double() - exact).abs() > torch.finfo(x.dtype).eps * rounded + sums).any()):
        sys.exit(f"the product of {tuple(x.shape)} and {tuple(weight.shape)} is wrong; no time is worth taking")


# The parts.


def part_check(quick: bool) -> Iterator[Row]:
    """The tests of the kernels, compiled for this GPU; without one, in the interpreter."""
    interpret = "0" if DEVICE.type == "cuda" else "1"
    # deterministic cuBLAS, which the tests ask for, wants a workspace of fixed size
    environment = os.environ | {"TRITON_INTERPRET": interpret, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={results}", *(TESTS[:1] if quick else TESTS)]
        done = subprocess.run(command, check=False, cwd=record.ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"the kernels are wrong on this machine; no time is worth taking\n{done.stdout[-4000:]}")
        cases = list(ElementTree.parse(results).getroot().iter("testcase"))
    for name in dict.fromkeys(str(one.get("classname")) for one in cases):
        own = [one for one in cases if one.get("classname") == name]
        skipped = sum(one.find("skipped") is not None for one in own)
        yield {"tests": name, "passed": len(own) - skipped, "skipped": skipped}


def part_gram(quick: bool) -> Iterator[Row]:
    for width, tokens in [(32, 64)] if quick else [(4096, 8192), (14336, 8192), (8192, 8192), (28672, 8192)]:
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
    x = random(64 if quick else 8192, 32 if quick else 4096)
    times = {}
    for name in here("column_moments"):
        with asked(f"column_moments={name}"):
            times[name] = seconds_eager(update_moments, x, repeats=20)
    yield {"tokens": len(x), "width": x.shape[1], **times}


def part_solve(quick: bool) -> Iterator[Row]:
    """One matrix by SparseGPT, statistics given."""
    for outputs, inputs in [TINY] if quick else SHAPES[:4]:
        stats = Stats(inputs, SparseGPT.needs, DEVICE)
        stats.update(random(4 * inputs, inputs))
        matrix = Matrix("weight", random(outputs, inputs, dtype=torch.float32))
        for amount, budget in (("2:4", Budget.of(None, Pattern(2, 4))), ("50 %", Budget(0.5))):
            times, losses = {}, {}
            for name in here("sparsegpt_block"):
                with asked(f"sparsegpt_block={name}"):
                    losses[name] = solve(matrix, stats, budget)
                    times[name] = seconds_eager(solve, matrix, stats, budget, repeats=3 if name == "triton" else 1)
            if max(losses.values()) - min(losses.values()) > 1e-3 * losses["torch"]:
                sys.exit(f"the losses of {outputs} x {inputs} differ: {losses}")
            yield {"outputs": outputs, "inputs": inputs, "amount": amount, **times}


def part_decode(quick: bool) -> Iterator[Row]:
    """Few tokens: cuBLAS and cuSPARSELt, both on what they like best, beside the packed forms."""
    ways = [name for name in here("matmul24") if name in ("gluon", "triton")]
    library = "cusparselt" in here("matmul24")
    for outputs, inputs in [TINY] if quick else SHAPES + JOINED:
        weight = two_of_four(outputs, inputs)
        packed = sparse24.pack24(weight)
        compressed = sparse24.compress24(weight) if library else None
        masked = {share: some_zero(outputs, inputs, share) for share in (0.5, 0.7)}
        stored = {share: bitmask.pack_bitmask(one) for share, one in masked.items()}
        beside = {share: overflow.pack_overflow(one) for share, one in masked.items()}
        for tokens in TOKENS[:4] if quick else TOKENS:
            x = random(tokens, inputs)
            row: Row = {"outputs": outputs, "inputs": inputs, "tokens": tokens}
            row["cublas"] = seconds(dense_product, x, weight)
            if compressed is not None:
                row["cusparselt"] = seconds(sparse24.matmul24_cusparselt, x, *packed, compressed)
            for name in ways:
                with asked(f"matmul24={name}"):
                    # random masks hold all six pairs of places: a wrong reading of the metadata cannot pass
                    check_product(sparse24.matmul24(x, *packed), x, weight)
                    row[f"2:4 {name}"] = seconds(sparse24.matmul24, x, *packed)
            with asked("matmul_bitmask=triton"):
                for share, one in stored.items():
                    check_product(bitmask.matmul_bitmask(x, one), x, masked[share])
                    row[f"bitmask {share:.0%}"] = seconds(bitmask.matmul_bitmask, x, one)
            with asked(f"matmul_overflow=triton,matmul24={ways[0]}"):
                for share, one in beside.items() if tokens <= eligibility.OVERFLOW_TOKENS else ():
                    base = sparse24.unpack24(one.values_OV, one.metadata_OB)
                    check_product(overflow.matmul_overflow(x, one), x, masked[share], base)
                    row[f"2:4 and surplus {share:.0%}"] = seconds(overflow.matmul_overflow, x, one)
            yield row


def part_prefill(quick: bool) -> Iterator[Row]:
    """More tokens than the decode kernel takes: the matrix is expanded, then cuBLAS multiplies; or cuSPARSELt."""
    library = "cusparselt" in here("matmul24")
    shapes, counts = ([TINY], [128]) if quick else (SHAPES + JOINED, [128, 512, 2048, 8192])
    for (outputs, inputs), tokens in itertools.product(shapes, counts):
        weight, x = two_of_four(outputs, inputs), random(tokens, inputs)
        packed = sparse24.pack24(weight)
        row: Row = {"outputs": outputs, "inputs": inputs, "tokens": tokens}
        row["cublas"] = seconds(dense_product, x, weight)
        with asked("matmul24=triton,unpack24=triton"):
            check_product(sparse24.matmul24(x, *packed), x, weight)
            row["expand"] = seconds(sparse24.unpack24, *packed)
            row["expand and multiply"] = seconds(sparse24.matmul24, x, *packed)
        if library:
            compressed = sparse24.compress24(weight)
            with asked("matmul24=cusparselt"):
                check_product(sparse24.matmul24(x, *packed, compressed), x, weight)
                row["cusparselt"] = seconds(sparse24.matmul24, x, *packed, compressed)
        yield row


PARTS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "check": part_check,
    "gram": part_gram,
    "moments": part_moments,
    "solve": part_solve,
    "decode": part_decode,
    "prefill": part_prefill,
}


def unchecked() -> str | None:
    """Why times of this GPU are not worth taking yet; None if `check` has passed on it with these versions."""
    check, now = record.load("gpu").get("measured", {}).get("check"), record.environment("triton")
    if check is None:
        return "`check` comes first"
    same = all(check["environment"][key] == now[key] for key in ("hardware", "versions"))
    return (
        None if same else f"`check` was passed on {check['environment']['hardware']} with other versions, run it anew"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, nothing written: does the script run?")
    arguments = parser.parse_args()
    need_gpu(quick=arguments.quick)
    reason = None if arguments.quick or arguments.parts[0] == "check" else unchecked()
    if reason is not None:
        sys.exit(reason)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    run_parts("gpu", {name: PARTS[name](arguments.quick) for name in arguments.parts}, "", quick=arguments.quick)


if __name__ == "__main__":
    main()
