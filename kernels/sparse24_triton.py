"""2:4 kernels in Triton. Layout and meaning of the operands: `sparse24.py`."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from llmprune.kernels import eligibility
from llmprune.kernels.tuned import configuration


@triton.jit
def expand24(pairs, words, BLOCK_O: tl.constexpr, WORDS: tl.constexpr):
    """Dense int16 [BLOCK_O, 32 WORDS] from kept pairs int32 [BLOCK_O, 8 WORDS] and metadata int32 [BLOCK_O, WORDS]."""
    shift = (tl.arange(0, 8) * 4)[None, None, :]
    nibble = tl.reshape((words[:, :, None] >> shift) & 15, (BLOCK_O, 8 * WORDS))
    first = nibble & 3
    second = nibble & 12
    low = pairs.to(tl.int16)
    high = (pairs >> 16).to(tl.int16)
    none = tl.zeros_like(low)
    d0 = tl.where(first == 0, low, none)
    d1 = tl.where(first == 1, low, tl.where(second == 4, high, none))
    d2 = tl.where(first == 2, low, tl.where(second == 8, high, none))
    d3 = tl.where(second == 12, high, none)
    # joining twice interleaves the four columns of a group: registers are renamed, nothing moves
    return tl.reshape(tl.join(tl.join(d0, d2), tl.join(d1, d3)), (BLOCK_O, 32 * WORDS))


@triton.jit
def load24(
    pairs_ptr, words_ptr, o, word, outputs, inputs, BLOCK_O: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr
):
    """The pairs and metadata of rows `o` from metadata word `word` on; zeros beyond the matrix."""
    w = word + tl.arange(0, WORDS)[None, :]
    p = word * 8 + tl.arange(0, 8 * WORDS)[None, :]
    row = o[:, None].to(tl.int64)
    pairs_at = pairs_ptr + row * (inputs // 4) + p
    words_at = words_ptr + row * (inputs // 32) + w
    if EVEN:
        return tl.load(pairs_at), tl.load(words_at)
    inside = o[:, None] < outputs
    pairs = tl.load(pairs_at, mask=inside & (p < inputs // 4), other=0)
    return pairs, tl.load(words_at, mask=inside & (w < inputs // 32), other=0)


@triton.jit
def matmul24_kernel(
    x_ptr, pairs_ptr, words_ptr, y_ptr, tokens, outputs, inputs, x_stride,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, WORDS: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """y[split, t, o] = sum over this split's columns of x[t, i] W[o, i]; one program owns BLOCK_O outputs of a split."""
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    split = tl.program_id(1)
    t = tl.arange(0, BLOCK_T)
    i = tl.arange(0, 32 * WORDS)
    sums = tl.zeros((BLOCK_O, BLOCK_T), dtype=tl.float32)
    for step in range(split, tl.cdiv(inputs, 32 * WORDS), SPLIT):
        pairs, words = load24(pairs_ptr, words_ptr, o, step * WORDS, outputs, inputs, BLOCK_O, WORDS, EVEN)
        column = step * (32 * WORDS) + i
        inside = t[None, :] < tokens
        if not EVEN:
            inside = inside & (column[:, None] < inputs)
        x = tl.load(x_ptr + t[None, :].to(tl.int64) * x_stride + column[:, None], mask=inside, other=0.0)
        weight = expand24(pairs, words, BLOCK_O, WORDS).to(x_ptr.dtype.element_ty, bitcast=True)
        # the weights are the first operand: their 64 rows fill a tensor core, a few tokens would not
        sums = tl.dot(weight, x, sums)
    place = (split * tokens + t[None, :]).to(tl.int64) * outputs + o[:, None]
    tl.store(y_ptr + place, sums.to(y_ptr.dtype.element_ty), mask=(t[None, :] < tokens) & (o[:, None] < outputs))


@triton.jit
def unpack24_kernel(
    pairs_ptr, words_ptr, dense_ptr, outputs, inputs,
    BLOCK_O: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    word = tl.program_id(1) * WORDS
    pairs, words = load24(pairs_ptr, words_ptr, o, word, outputs, inputs, BLOCK_O, WORDS, EVEN)
    column = word * 32 + tl.arange(0, 32 * WORDS)[None, :]
    place = o[:, None].to(tl.int64) * inputs + column
    inside = (o[:, None] < outputs) & (column < inputs)
    tl.store(dense_ptr + place, expand24(pairs, words, BLOCK_O, WORDS), mask=inside)


def matmul24(x_TI: torch.Tensor, values_OV: torch.Tensor, metadata_OB: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Few tokens: memory traffic decides, and a 2:4 matrix is 0.5625 of the dense bytes. Many: expand and multiply."""
    tokens, inputs = x_TI.shape
    if tokens > eligibility.DECODE_TOKENS:
        return x_TI @ unpack24(values_OV, metadata_OB).T
    outputs = len(values_OV)
    launch: dict[str, Any] = configuration("matmul24", x_TI.device, tokens=tokens, outputs=outputs)
    split = launch["SPLIT"]
    # partial sums of the splits are added in fixed order, so the result repeats to the bit
    y_STO = x_TI.new_empty(split, tokens, outputs, dtype=torch.float32 if split > 1 else None)
    matmul24_kernel[(triton.cdiv(outputs, launch["BLOCK_O"]), split)](
        x_TI,
        values_OV.view(torch.int32),
        metadata_OB.view(torch.int32),
        y_STO,
        tokens,
        outputs,
        inputs,
        x_TI.stride(0),
        EVEN=_even(outputs, inputs, launch),
        **launch,
    )
    return y_STO.sum(0).to(x_TI.dtype) if split > 1 else y_STO[0]


def unpack24(values_OV: torch.Tensor, metadata_OB: torch.Tensor) -> torch.Tensor:
    outputs, inputs = len(values_OV), values_OV.shape[1] * 2
    launch: dict[str, Any] = configuration("unpack24", values_OV.device)
    weight_OI = values_OV.new_empty(outputs, inputs)
    unpack24_kernel[(triton.cdiv(outputs, launch["BLOCK_O"]), triton.cdiv(inputs, 32 * launch["WORDS"]))](
        values_OV.view(torch.int32),
        metadata_OB.view(torch.int32),
        weight_OI.view(torch.int16),
        outputs,
        inputs,
        EVEN=_even(outputs, inputs, launch),
        **launch,
    )
    return weight_OI


def _even(outputs: int, inputs: int, launch: dict[str, Any]) -> bool:
    """Whether the blocks fill the matrix, so that loads of it need no mask."""
    return bool(outputs % launch["BLOCK_O"] == 0 and inputs % (32 * launch["WORDS"]) == 0)
