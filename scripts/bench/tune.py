"""Choose launch configurations of the Triton kernels on this GPU, and say where which kernel is the fastest.

    python scripts/bench/tune.py [KERNEL ...]      # one kernel at a time where a run may last ten minutes only

For every bucket of a kernel a few launches are tried; one whose result differs from torch's is dropped. The fastest go to
kernels/configurations/NAME.json. A bucket in which the kernel beats everything that would run in its place is marked
`faster`, and from then on the kernel runs there by itself on GPUs of that name. For cuSPARSELt what is chosen is the number
of tokens from which on it beats expanding the matrix and multiplying.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from typing import Any

import torch
from device import DEVICE, asked, here, need_gpu, random, seconds_eager, two_of_four

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
        "SPLIT": [1, 4],
        "num_warps": [4, 8],
        "num_stages": [2, 3],
    },
    "matmul24_gluon": {"STRIPS": [1, 2, 4], "SPLIT": [1, 2, 4], "num_warps": [4, 8, 16]},
    "matmul_bitmask": {
        "BLOCK_O": [64, 128],
        "WORDS": [2, 4],
        "SPLIT": [2, 4, 8],
        "num_warps": [4, 8],
        "num_stages": [2, 3],
    },
    "unpack24": {"BLOCK_O": [16, 32, 64], "WORDS": [2, 4, 8], "num_warps": [4, 8]},
}
# The setting that runs a kernel, where it is not its name with `=triton`, and what else may run in its place.
OPERATION = {"matmul24_gluon": "matmul24=gluon"}
RIVALS = {"matmul24_gluon": ("torch", "matmul24=triton")}
LIBRARY = "matmul24_cusparselt"
PREFILL_TOKENS = [128, 256, 512, 1024, 2048, 4096, 8192]
NEVER = 1 << 31
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


def tune(kernel: str, entries: list[dict[str, Any]]) -> None:
    """Put the fastest launch into every entry, and whether it is faster than what would run otherwise."""
    from triton.errors import TritonError

    for entry in entries:
        call = call_of(kernel, entry["up_to"])
        rivals = []
        for rival in RIVALS.get(kernel, ("torch",)):
            with asked(rival):
                expected = call()
                rivals.append(seconds_eager(call, repeats=10))
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
        entry |= {"launch": best, "faster": took < min(rivals)}
        others = ", ".join(f"{one * 1e6:.1f} us" for one in rivals)
        print(f"{kernel} {entry}: {took * 1e6:.1f} us, otherwise {others}", flush=True)


def tune_library(entries: list[dict[str, Any]]) -> None:
    """From how many tokens on cuSPARSELt is the faster way at every larger number too."""
    for entry in entries:
        least = NEVER
        outputs = entry["up_to"].get("outputs", 14336)
        weight = two_of_four(outputs, 4096)
        packed, compressed = sparse24.pack24(weight), sparse24.compress24(weight)
        for tokens in reversed(PREFILL_TOKENS):
            x = random(tokens, 4096)
            times = []
            for name in ("cusparselt", "torch"):
                with asked(f"matmul24={name}"):
                    times.append(seconds_eager(sparse24.matmul24, x, *packed, compressed, repeats=10))
            print(
                f"{LIBRARY} {outputs} outputs, {tokens} tokens: {times[0] * 1e6:.1f} us, otherwise {times[1] * 1e6:.1f}"
            )
            if times[0] >= times[1]:
                break
            least = tokens
        entry["launch"] = {"LEAST_TOKENS": least}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kernels = [*TRIALS, LIBRARY]
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"of {', '.join(kernels)}; all if none is named")
    arguments = parser.parse_args()
    need_gpu(quick=False)
    torch.manual_seed(0)
    path = tuned.path_of(DEVICE)
    chosen = json.loads((path if path.is_file() else tuned.FOLDER / "default.json").read_text())
    for kernel in arguments.kernels or kernels:
        if kernel != LIBRARY:
            tune(kernel, chosen[kernel])
        elif "cusparselt" in here("matmul24"):
            tune_library(chosen[kernel])
        chosen.update(gpu=torch.cuda.get_device_name(), note="made by scripts/bench/tune.py")
        path.write_text(json.dumps(chosen, indent=1) + "\n")
        tuned._read.cache_clear()  # what is tuned next is held against what has been tuned


if __name__ == "__main__":
    main()
