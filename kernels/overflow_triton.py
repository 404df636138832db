"""Product with a 2:4 matrix and its surplus in Triton. Layout of the operands: `overflow.py`."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from llmprune.kernels import dispatch
from llmprune.kernels.tuned import configuration


@triton.jit
def add_surplus_kernel(
    x_ptr, extra_ptr, columns_ptr, starts_ptr, y_ptr, tokens, outputs, x_stride,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """y[t, o] += sum over the surplus of row o of x[t, column] times the weight; one program owns a row."""
    o = tl.program_id(0)
    t = tl.arange(0, BLOCK_T)
    start = tl.load(starts_ptr + o)
    end = tl.load(starts_ptr + o + 1)
    sums = tl.zeros((BLOCK_T, BLOCK_S), dtype=tl.float32)
    for first in range(start, end, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        inside = s < end
        weight = tl.load(extra_ptr + s, mask=inside, other=0.0).to(tl.float32)
        column = tl.load(columns_ptr + s, mask=inside, other=0).to(tl.int32) & 0xFFFF
        x_at = x_ptr + t[:, None].to(tl.int64) * x_stride + column[None, :]
        x = tl.load(x_at, mask=(t[:, None] < tokens) & inside[None, :], other=0.0).to(tl.float32)
        sums += x * weight[None, :]
    y_at = y_ptr + t.to(tl.int64) * outputs + o
    y = tl.load(y_at, mask=t < tokens, other=0.0).to(tl.float32) + tl.sum(sums, 1)
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=t < tokens)


def matmul_overflow(
    x_TI: torch.Tensor,
    values_OV: torch.Tensor,
    metadata_OB: torch.Tensor,
    extra_S: torch.Tensor,
    columns_S: torch.Tensor,
    starts_O1: torch.Tensor,
) -> torch.Tensor:
    """Up to 8 tokens: every weight of the surplus is read once, for all of them."""
    tokens, outputs = len(x_TI), len(values_OV)
    y_TO: torch.Tensor = dispatch.run("matmul24", x_TI, values_OV, metadata_OB, None)
    launch: dict[str, Any] = configuration("add_surplus", x_TI.device, tokens=tokens)
    add_surplus_kernel[(outputs,)](x_TI, extra_S, columns_S, starts_O1, y_TO, tokens, outputs, x_TI.stride(0), **launch)
    return y_TO
