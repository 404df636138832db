"""Choose launch configurations of the Triton kernels on this GPU, and say which kernels beat plain torch.

    python scripts/bench/tune.py [KERNEL ...]

For every bucket of a kernel a few launches are tried; one whose result differs from torch's is dropped. The fastest go to
kernels/configurations/NAME.json. A kernel that is faster than torch in every bucket is listed there under `beats_torch`,
and from then on runs by itself on GPUs of that name.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable

import torch
from gpu import DEVICE, asked, random, seconds_eager, two_of_four

from llmprune.kernels import bitmask, dispatch, gram, sparse24, sparsegpt_block, tuned
from llmprune.types import Budget, Pattern

# What is tried, for each kernel: every combination.
TRIALS: dict[str, dict[str, list[int]]] = {
    "gram_update": {"BLOCK_I": [64, 128], "BLOCK_T": [32, 64], "num_warps": [4, 8], "num_stages": [3, 4]},
    "column_moments": {"BLOCK_T": [16, 32], "BLOCK_I": [64, 128, 256], "num_warps": [4, 8]},
    "sparsegpt_block": {"BLOCK_O": [4, 8, 16], "num_warps": [1, 2, 4, 8]},
    "matmul24": {
        "BLOCK_O": [64, 128],
        "WORDS": [4, 8],
        "SPLIT": [1, 2, 4, 8],
        "num_warps": [4, 8],
        "num_stages": [2, 3, 4],
    },
    "matmul24_gluon": {"num_warps": [2, 4, 8, 16]},
    "matmul_bitmask": {
        "BLOCK_O": [64, 128],
        "WORDS": [2, 4],
        "SPLIT": [2, 4, 8],
        "num_warps": [4, 8],
        "num_stages": [2, 3],
    },
    "unpack24": {"BLOCK_O": [16, 32, 64], "WORDS": [2, 4, 8], "num_warps": [4, 8]},
}
# The setting that runs a kernel, where it is not its name with `=triton`.
OPERATION = {"matmul24_gluon": "matmul24=gluon"}
# Relative Frobenius error against torch above which a launch is wrong: the widest rounding is that of bfloat16.
TOLERANCE = 1e-2

Call = Callable[[], torch.Tensor]


def call_of(kernel: str, up_to: dict[str, int]) -> Call:
    """A call of the size of a bucket, on matrices as Llama 3 8B has them; gives the result."""
    outputs, inputs = (4096 if "outputs" in up_to else 14336), 4096
    if kernel == "gram_update":
        x = random(8192, inputs, dtype=torch.bfloat16 if up_to.get("bits") == 16 else torch.float32)
        return lambda: gram.gram_update_(torch.zeros(inputs, inputs, device=DEVICE), x).tril_()
    if kernel == "column_moments":
        x = random(8192, inputs)
        return lambda: torch.stack(dispatch.run("column_moments", x))
    if kernel == "sparsegpt_block":
        return _block_call()
    x, weight = random(up_to.get("tokens", 64), inputs), two_of_four(outputs, inputs)
    if kernel == "matmul_bitmask":
        packed = bitmask.pack_bitmask(weight)
        return lambda: bitmask.matmul_bitmask(x, packed)
    pair = sparse24.pack24(weight)
    return (lambda: sparse24.unpack24(*pair)) if kernel == "unpack24" else (lambda: sparse24.matmul24(x, *pair))


def _block_call(columns: int = 128, outputs: int = 4096) -> Call:
    block = random(columns, outputs, dtype=torch.float32)
    x = random(4 * columns, columns, dtype=torch.float32)
    inverse_t = torch.linalg.cholesky(torch.linalg.inv(x.T @ x / len(x)))
    budget = Budget.of(None, Pattern(2, 4))

    def call() -> torch.Tensor:
        current = block.clone()
        sparsegpt_block.solve_block(current, inverse_t, torch.zeros_like(block, dtype=torch.bool), budget)
        return current

    return call


def tune(kernel: str, entries: list[dict[str, dict[str, int]]]) -> bool:
    """Put the fastest launch into every entry; whether the kernel beats torch in all of them."""
    from triton.errors import TritonError

    wins = True
    for entry in entries:
        call = call_of(kernel, entry["up_to"])
        with asked("torch"):
            expected, plain = call(), seconds_eager(call, repeats=10)
        best, took = entry["launch"], float("inf")
        for values in itertools.product(*TRIALS[kernel].values()):
            launch = {**entry["launch"], **dict(zip(TRIALS[kernel], values, strict=True))}
            with tuned.trial(kernel, launch), asked(OPERATION.get(kernel, f"{kernel}=triton")):
                try:
                    right = bool(torch.linalg.norm((call() - expected).float()) <= TOLERANCE * expected.float().norm())
                    seconds = seconds_eager(call, repeats=10) if right else float("inf")
                except TritonError:  # too large for this GPU
                    continue
            if not right:
                print(f"{kernel} {launch} is wrong", flush=True)
            if seconds < took:
                best, took = launch, seconds
        entry["launch"] = best
        wins = wins and took < plain
        print(f"{kernel} {entry}: {took * 1e6:.1f} us, torch {plain * 1e6:.1f} us", flush=True)
    return wins


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"of {', '.join(TRIALS)}; all if none is named")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA GPU here to tune for")
    torch.manual_seed(0)
    path = tuned.FOLDER / f"{tuned.name_of(torch.device(DEVICE))}.json"
    chosen = json.loads((path if path.is_file() else tuned.FOLDER / "default.json").read_text())
    for kernel in arguments.kernels or TRIALS:
        won = tune(kernel, chosen[kernel])
        chosen["beats_torch"] = sorted({*chosen["beats_torch"], kernel} if won else {*chosen["beats_torch"]} - {kernel})
        chosen.update(gpu=torch.cuda.get_device_name(), note="made by scripts/bench/tune.py")
        path.write_text(json.dumps(chosen, indent=1) + "\n")


if __name__ == "__main__":
    main()
