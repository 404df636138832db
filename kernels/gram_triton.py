"""Gram update in Triton: `G += X'X` on tensor cores, lower triangle only, several inputs a launch."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from llmprune.kernels.tuned import configuration


@triton.jit
def lower_tile(number):
    """Row and column of tile `number` of a lower triangle, counted row by row."""
    row = ((tl.sqrt(8.0 * number.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # the square root is rounded: one step either way
    row = tl.where(row * (row + 1) // 2 > number, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= number, row + 1, row)
    return row, number - row * (row + 1) // 2


@triton.jit
def gram_kernel(
    table_ptr, width,
    DTYPE: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program owns one tile of one Gram matrix, so sums have one order. A table row: X, G, tokens."""
    row, column = lower_tile(tl.program_id(0))
    entry = table_ptr + 3 * tl.program_id(1)
    x_ptr = tl.multiple_of(tl.load(entry).to(tl.pointer_type(DTYPE)), 16)
    gram_ptr = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(tl.float32)), 16)
    tokens = tl.load(entry + 2).to(tl.int32)
    i = row * BLOCK_I + tl.arange(0, BLOCK_I)
    j = column * BLOCK_I + tl.arange(0, BLOCK_I)
    sums = tl.zeros((BLOCK_I, BLOCK_I), dtype=tl.float32)
    for start in range(0, tokens, BLOCK_T):
        t = (start + tl.arange(0, BLOCK_T))[:, None]
        inside_i, inside_j = t < tokens, t < tokens
        if not EVEN:
            inside_i, inside_j = inside_i & (i[None, :] < width), inside_j & (j[None, :] < width)
        x_TI = tl.load(x_ptr + t.to(tl.int64) * width + i[None, :], mask=inside_i, other=0.0)
        x_TJ = tl.load(x_ptr + t.to(tl.int64) * width + j[None, :], mask=inside_j, other=0.0)
        sums = tl.dot(tl.trans(x_TI), x_TJ, sums, input_precision=PRECISION)
    place = gram_ptr + i[:, None].to(tl.int64) * width + j[None, :]
    inside = (i[:, None] < width) & (j[None, :] < width)
    tl.store(place, tl.load(place, mask=inside, other=0.0) + sums, mask=inside)


def gram_update_(*operands: torch.Tensor) -> None:
    """`operands`: Gram matrix and inputs, alternating; all of one width and dtype."""
    lowers = operands[::2]
    inputs = [one if one.is_contiguous() else one.contiguous() for one in operands[1::2]]
    # the hint of 16-byte alignment must hold; torch's own allocations are aligned, slices of them may not be
    inputs = [one if one.data_ptr() % 16 == 0 else one.clone() for one in inputs]
    width = len(lowers[0])
    rows = [(x.data_ptr(), lower.data_ptr(), len(x)) for x, lower in zip(inputs, lowers, strict=True)]
    # the driver has taken its copy when the call returns, so nothing waits for the GPU
    table_N3 = torch.tensor(rows, dtype=torch.int64).to(lowers[0].device, non_blocking=True)
    dtype = inputs[0].dtype
    launch: dict[str, Any] = configuration("gram_update", lowers[0].device, bits=dtype.itemsize * 8)
    tiles = triton.cdiv(width, launch["BLOCK_I"])
    gram_kernel[(tiles * (tiles + 1) // 2, len(rows))](
        table_N3,
        width,
        DTYPE=getattr(tl, str(dtype).removeprefix("torch.")),
        EVEN=width % launch["BLOCK_I"] == 0,
        # three passes of tensor cores for float32, where one would keep 10 bits; 16-bit products are exact anyway
        PRECISION="tf32x3" if dtype == torch.float32 else "ieee",
        **launch,
    )
