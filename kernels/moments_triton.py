"""Column moments in Triton: partial moments of chunks of tokens, combined in fixed order."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from llmprune.kernels.tuned import configuration


@triton.jit
def moments_kernel(
    x_ptr, squares_ptr, mean_ptr, deviation_ptr, tokens, width, x_stride,
    BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Moments of BLOCK_I columns over a chunk of BLOCK_T * STEPS tokens, tile by tile, by the rule of Chan et al."""
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    first = tl.program_id(1) * (BLOCK_T * STEPS)
    squares = tl.zeros((BLOCK_I,), dtype=tl.float32)
    mean = tl.zeros((BLOCK_I,), dtype=tl.float32)
    deviation = tl.zeros((BLOCK_I,), dtype=tl.float32)
    seen = 0.0
    for start in range(first, tl.minimum(first + BLOCK_T * STEPS, tokens), BLOCK_T):
        t = (start + tl.arange(0, BLOCK_T))[:, None]
        inside = (t < tokens) & (i[None, :] < width)
        x = tl.load(x_ptr + t.to(tl.int64) * x_stride + i[None, :], mask=inside, other=0.0).to(tl.float32)
        count = tl.minimum(tokens - start, BLOCK_T).to(tl.float32)
        tile_mean = tl.sum(x, 0) * (1.0 / count)
        centred = tl.where(inside, x - tile_mean[None, :], 0.0)
        gap = tile_mean - mean
        total = seen + count
        deviation += tl.sum(centred * centred, 0) + gap * gap * (seen * count / total)
        mean += gap * (count / total)
        squares += tl.sum(x * x, 0)
        seen = total
    place = tl.program_id(1) * width + i
    tl.store(squares_ptr + place, squares, mask=i < width)
    tl.store(mean_ptr + place, mean, mask=i < width)
    tl.store(deviation_ptr + place, deviation, mask=i < width)


def column_moments(x_TI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x_TI = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
    tokens, width = x_TI.shape
    launch: dict[str, Any] = configuration("column_moments", x_TI.device)
    chunk = launch["BLOCK_T"] * launch["STEPS"]
    chunks = triton.cdiv(tokens, chunk)
    squares_CI, mean_CI, deviation_CI = x_TI.new_empty(3, chunks, width, dtype=torch.float32)
    moments_kernel[(triton.cdiv(width, launch["BLOCK_I"]), chunks)](
        x_TI, squares_CI, mean_CI, deviation_CI, tokens, width, x_TI.stride(0), **launch
    )
    count_C1 = torch.full((chunks, 1), float(chunk), device=x_TI.device)
    count_C1[-1] = tokens - chunk * (chunks - 1)
    # Chan's rule for all chunks at once
    mean_I = (mean_CI * count_C1).sum(0) / tokens
    return squares_CI.sum(0), mean_I, (deviation_CI + count_C1 * (mean_CI - mean_I).square()).sum(0)
