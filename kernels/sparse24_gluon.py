"""2:4 product for few tokens on sparse tensor cores (`mma.sp`, Ampere and later), in Gluon.

The packed form of `sparse24.py` is read as it lies. An instruction multiplies 16 rows x 32 columns of weights; which
columns they are is free, as long as the activations are taken from the same ones. So lane c of four takes the four
consecutive groups 4c ... 4c + 3 of a step of 64 columns, one load of 16 bytes a row, and its groups 4c + 2h + u go to
place u of instruction h. `tests/support/mma.py` emulates this, register by register.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code=assignment
from __future__ import annotations

from typing import Any

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from llmprune.kernels import eligibility
from llmprune.kernels.sparse24 import unpack24
from llmprune.kernels.tuned import configuration

# Rows of one strip, and tokens of one instruction.
ROWS, TOKENS = 16, 8

_ASM = """{
.reg .f32 t0, t1, t2, t3;
INSTRUCTION {t0, t1, t2, t3}, {$4, $8, $5, $9}, {$12, $13, $14, $15}, {$20, $21, $22, $23}, $24, 0x0;
INSTRUCTION {$0, $1, $2, $3}, {$6, $10, $7, $11}, {$16, $17, $18, $19}, {t0, t1, t2, t3}, $24, 0x1;
}"""
_INSTRUCTION = "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.TYPE.TYPE.f32"
ASM = {
    dtype: _ASM.replace("INSTRUCTION", _INSTRUCTION.replace("TYPE", name))
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "f16"))
}


@gluon.jit
def _nibbles(words, lane):
    """Of a row's 16 nibbles those of the groups lane, lane + 4, lane + 8, lane + 12, as 16 bits."""
    low = words.to(gl.int32) >> (4 * lane)
    high = (words >> 32).to(gl.int32) >> (4 * lane)
    return (low & 15) | ((low >> 12) & 0xF0) | ((high & 15) << 8) | ((high >> 4) & 0xF000)


@gluon.jit
def matmul24_kernel(
    x_ptr, pairs_ptr, words_ptr, y_ptr, tokens, outputs, inputs, x_stride,
    ASM: gl.constexpr, BLOCKS: gl.constexpr, STRIPS: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """y[split, t, o] for STRIPS times 16 outputs, over this split's steps; its warps share those, summed in fixed order.

    `x_ptr` and `x_stride` count pairs of activations (int32), `words_ptr` 16 nibbles (int64). All strips multiply the
    activations that were loaded once: with many tokens those, not the weights, are what a program mostly reads.
    """
    WARPS: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [WARPS, 1], [1, 0])
    thread = gl.arange(0, WARPS * 32, layout=gl.SliceLayout(1, layout))
    j = gl.arange(0, 4, layout=gl.SliceLayout(0, layout))[None, :]
    lane, warp = thread % 32, thread // 32
    g, c = lane // 4, lane % 4
    strip = gl.program_id(0) * STRIPS
    split = gl.program_id(1)
    row = (strip * 16 + g).to(gl.int64)
    steps = inputs // 64
    pairs_at = pairs_ptr + (row * (inputs // 4) + 4 * c)[:, None] + j
    words_at = words_ptr + row * steps
    # register j of the activations holds place 2j + c // 2 of the eight, columns 2 (c % 2) and the next of its group
    place = 2 * j + (c // 2)[:, None]
    pair = 8 * (place % 4) + 2 * (place // 4) + (c % 2)[:, None]
    sums = ()
    for _s in gl.static_range(STRIPS * BLOCKS):
        sums += (gl.zeros([WARPS * 32, 4], gl.float32, layout),)
    for first in range(split * WARPS, steps, WARPS * SPLIT):
        step = first + warp
        low, high, metadata = (), (), ()
        for s in gl.static_range(STRIPS):
            there = (step < steps) & ((strip + s) * 16 < outputs)
            at = pairs_at + 16 * s * (inputs // 4) + (step * 16)[:, None]
            low += (gl.load(at, mask=there[:, None], other=0),)
            high += (gl.load(at + 8 * (inputs // 4), mask=there[:, None], other=0),)
            # beyond the matrix the weights are zero, but metadata must name two places in order: 0 and 1
            low_words = gl.load(words_at + 16 * s * steps + step, mask=there, other=0x4444444444444444)
            high_words = gl.load(words_at + (16 * s + 8) * steps + step, mask=there, other=0x4444444444444444)
            metadata += ((_nibbles(low_words, c) | (_nibbles(high_words, c) << 16))[:, None] + 0 * j,)
        new = ()
        for n in gl.static_range(BLOCKS):
            inside = ((n * 8 + g < tokens) & (step < steps))[:, None]
            x_at = x_ptr + ((n * 8 + g).to(gl.int64) * x_stride + step * 32)[:, None] + pair
            x_first = gl.load(x_at, mask=inside, other=0)
            x_second = gl.load(x_at + 4, mask=inside, other=0)
            for s in gl.static_range(STRIPS):
                new += (
                    gl.inline_asm_elementwise(
                        ASM,
                        "=f,=f,=f,=f,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,f,f,f,f,r,r,r,r",
                        [low[s], high[s], x_first, x_second, sums[n * STRIPS + s], metadata[s]],
                        dtype=gl.float32,
                        is_pure=True,
                        pack=4,
                    ),
                )
        sums = new
    lanes = gl.arange(0, 32, layout=gl.SliceLayout(1, layout))[:, None]
    for n in gl.static_range(BLOCKS):
        for s in gl.static_range(STRIPS):
            total = gl.convert_layout(gl.sum(gl.reshape(sums[n * STRIPS + s], [WARPS, 32, 4]), axis=0), layout)
            o = (strip + s) * 16 + lanes // 4 + 8 * (j // 2)
            t = n * 8 + 2 * (lanes % 4) + j % 2
            y_at = y_ptr + (split * tokens + t).to(gl.int64) * outputs + o
            gl.store(y_at, total.to(y_ptr.dtype.element_ty), mask=(t < tokens) & (o < outputs))


def matmul24(x_TI: torch.Tensor, values_OV: torch.Tensor, metadata_OB: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Few tokens: memory traffic decides, and a 2:4 matrix is 0.5625 of the dense bytes. Many: expand and multiply."""
    tokens, inputs = x_TI.shape
    if tokens > eligibility.DECODE_TOKENS:
        return x_TI @ unpack24(values_OV, metadata_OB).T
    outputs = len(values_OV)
    launch: dict[str, Any] = configuration("matmul24_gluon", x_TI.device, tokens=tokens, outputs=outputs)
    split = launch["SPLIT"]
    # partial sums of the splits are added in fixed order, so the result repeats to the bit
    y_STO = x_TI.new_empty(split, tokens, outputs, dtype=torch.float32 if split > 1 else None)
    matmul24_kernel[(triton.cdiv(outputs, ROWS * launch["STRIPS"]), split)](
        x_TI.view(torch.int32),
        values_OV.view(torch.int32),
        metadata_OB.view(torch.int64),
        y_STO,
        tokens,
        outputs,
        inputs,
        x_TI.stride(0) // 2,
        ASM=ASM[x_TI.dtype],
        BLOCKS=triton.cdiv(tokens, TOKENS),
        **launch,
    )
    return y_STO.sum(0).to(x_TI.dtype) if split > 1 else y_STO[0]
