"""Product with a bitmask matrix in Triton. Layout of the operands: `bitmask.py`."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from llmprune.kernels import eligibility
from llmprune.kernels.tuned import configuration


@triton.jit
def count_bits(word, INTERPRETED: tl.constexpr):
    """The number of set bits of int32 words; the interpreter knows no assembly and adds them up in place."""
    if INTERPRETED:
        u = word.to(tl.uint32, bitcast=True)
        u = u - ((u >> 1) & 0x55555555)
        u = (u & 0x33333333) + ((u >> 2) & 0x33333333)
        u = (u + (u >> 4)) & 0x0F0F0F0F
        u = u + (u >> 8)
        u = u + (u >> 16)
        return (u & 63).to(tl.int32)
    else:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def matmul_bitmask_kernel(
    x_ptr, values_ptr, words_ptr, offsets_ptr, starts_ptr, y_ptr, tokens, outputs, inputs, x_stride,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, WORDS: tl.constexpr, SPLIT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """y[split, t, o] = sum over this split's columns of x[t, i] W[o, i]; one program owns BLOCK_O outputs of a split."""
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    split = tl.program_id(1)
    t = tl.arange(0, BLOCK_T)
    i = tl.arange(0, 32 * WORDS)
    shift = (tl.arange(0, 8) * 4)[None, None, :]
    width = tl.cdiv(inputs, 32)
    start = tl.load(starts_ptr + o, mask=o < outputs, other=0)[:, None]
    sums = tl.zeros((BLOCK_O, BLOCK_T), dtype=tl.float32)
    for step in range(split, tl.cdiv(width, WORDS), SPLIT):
        w = step * WORDS + tl.arange(0, WORDS)[None, :]
        inside = (o[:, None] < outputs) & (w < width)
        place = o[:, None].to(tl.int64) * width + w
        word = tl.load(words_ptr + place, mask=inside, other=0)
        before = tl.load(offsets_ptr + place, mask=inside, other=0).to(tl.int32) & 0xFFFF
        # eight groups of four columns a word: where each begins among the values of the row
        below = count_bits(word[:, :, None] & ((1 << shift) - 1), INTERPRETED)
        first = start + tl.reshape(before[:, :, None] + below, (BLOCK_O, 8 * WORDS))
        nibble = tl.reshape((word[:, :, None] >> shift) & 15, (BLOCK_O, 8 * WORDS))
        second = first + (nibble & 1)
        third = second + ((nibble >> 1) & 1)
        fourth = third + ((nibble >> 2) & 1)
        d0 = tl.load(values_ptr + first, mask=(nibble & 1) != 0, other=0.0)
        d1 = tl.load(values_ptr + second, mask=(nibble & 2) != 0, other=0.0)
        d2 = tl.load(values_ptr + third, mask=(nibble & 4) != 0, other=0.0)
        d3 = tl.load(values_ptr + fourth, mask=(nibble & 8) != 0, other=0.0)
        weight = tl.reshape(tl.join(tl.join(d0, d2), tl.join(d1, d3)), (BLOCK_O, 32 * WORDS))
        column = step * (32 * WORDS) + i
        x_at = x_ptr + t[None, :].to(tl.int64) * x_stride + column[:, None]
        x = tl.load(x_at, mask=(t[None, :] < tokens) & (column[:, None] < inputs), other=0.0)
        sums = tl.dot(weight, x, sums)
    out = (split * tokens + t[None, :]).to(tl.int64) * outputs + o[:, None]
    tl.store(y_ptr + out, sums.to(y_ptr.dtype.element_ty), mask=(t[None, :] < tokens) & (o[:, None] < outputs))


def matmul_bitmask(
    x_TI: torch.Tensor,
    values_V: torch.Tensor,
    words_OW: torch.Tensor,
    offsets_OW: torch.Tensor,
    starts_O1: torch.Tensor,
    inputs: int,
) -> torch.Tensor:
    """Up to 64 tokens."""
    tokens, outputs = len(x_TI), len(words_OW)
    launch: dict[str, Any] = configuration("matmul_bitmask", x_TI.device, tokens=tokens, outputs=outputs)
    # partial sums of the splits are added in fixed order, so the result repeats to the bit
    y_STO = x_TI.new_empty(launch["SPLIT"], tokens, outputs, dtype=torch.float32)
    matmul_bitmask_kernel[(triton.cdiv(outputs, launch["BLOCK_O"]), launch["SPLIT"])](
        x_TI,
        values_V,
        words_OW,
        offsets_OW,
        starts_O1,
        y_STO,
        tokens,
        outputs,
        inputs,
        x_TI.stride(0),
        INTERPRETED=eligibility.interpreted(),
        **launch,
    )
    return y_STO.sum(0).to(x_TI.dtype)
