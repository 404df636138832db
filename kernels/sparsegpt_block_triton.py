"""The column sweep of SparseGPT inside one block, in Triton: the block stays in registers from first to last column."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from llmprune.kernels.tuned import configuration
from llmprune.types import Budget


@triton.jit
def solve_kernel(
    current_ptr, inverse_t_ptr, pruned_ptr, loss_ptr, columns, outputs,
    current_stride, inverse_stride, pruned_stride,
    BLOCK_B: tl.constexpr, BLOCK_O: tl.constexpr, GROUP: tl.constexpr, PRUNE: tl.constexpr,
):  # fmt: skip
    """One program sweeps `columns` <= BLOCK_B columns of BLOCK_O outputs, tile BLOCK_B x BLOCK_O.

    GROUP 1: the mask is read. Else it is chosen: PRUNE of every GROUP columns, just before the first of them.
    """
    b = tl.arange(0, BLOCK_B)
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    inside = (b[:, None] < columns) & (o[None, :] < outputs)
    current_at = current_ptr + b[:, None].to(tl.int64) * current_stride + o[None, :]
    pruned_at = pruned_ptr + b[:, None].to(tl.int64) * pruned_stride + o[None, :]
    weight = tl.load(current_at, mask=inside, other=0.0)
    pruned = tl.zeros((BLOCK_B, BLOCK_O), dtype=tl.int32)
    if GROUP == 1:
        pruned = tl.load(pruned_at, mask=inside, other=0).to(tl.int32)
    diagonal = tl.load(inverse_t_ptr + b * inverse_stride + b, mask=b < columns, other=1.0)
    member = tl.arange(0, GROUP)
    loss = tl.zeros((BLOCK_O,), dtype=tl.float32)
    for first in range(0, columns, GROUP):
        if GROUP > 1:
            here = (tl.arange(0, BLOCK_B // GROUP) == first // GROUP)[:, None, None]
            score = weight / diagonal[:, None]
            score = tl.reshape(score * score, (BLOCK_B // GROUP, GROUP, BLOCK_O))
            score = tl.sum(tl.where(here, score, 0.0), 0)
            # the rank of a score is how many stand before it; ties go to the lower column
            lower = (member[None, :] < member[:, None])[:, :, None]
            mine, other = score[:, None, :], score[None, :, :]
            before = (other < mine) | ((other == mine) & lower)
            chosen = (tl.sum(before.to(tl.int32), 1) < PRUNE).to(tl.int32)
            old = tl.reshape(pruned, (BLOCK_B // GROUP, GROUP, BLOCK_O))
            pruned = tl.reshape(tl.where(here, chosen[None, :, :], old), (BLOCK_B, BLOCK_O))
        for step in range(GROUP):
            column = first + step
            own = tl.load(inverse_t_ptr + column * inverse_stride + column)
            at_column = (b == column)[:, None] & (pruned != 0)
            error = tl.sum(tl.where(at_column, weight, 0.0), 0) / own
            later = tl.load(inverse_t_ptr + b * inverse_stride + column, mask=(b > column) & (b < columns), other=0.0)
            weight -= later[:, None] * error[None, :]
            loss += error * error
    tl.store(current_at, tl.where(pruned != 0, 0.0, weight), mask=inside)
    if GROUP > 1:
        tl.store(pruned_at, pruned.to(tl.int8), mask=inside)
    tl.store(loss_ptr + o, loss, mask=o < outputs)


def solve_block(
    current_BO: torch.Tensor, inverse_t_BB: torch.Tensor, pruned_BO: torch.Tensor, budget: Budget
) -> torch.Tensor:
    columns, outputs = current_BO.shape
    group = budget.pattern.group or 1
    launch: dict[str, Any] = configuration("sparsegpt_block", current_BO.device)
    # every output is a column of the transposed matrix: neighbours in memory, and independent of each other
    current = current_BO if current_BO.stride(1) == 1 else current_BO.contiguous()
    pruned = pruned_BO if pruned_BO.stride(1) == 1 else pruned_BO.contiguous()
    inverse_t = inverse_t_BB if inverse_t_BB.stride(1) == 1 else inverse_t_BB.contiguous()
    loss_O = current.new_empty(outputs)
    solve_kernel[(triton.cdiv(outputs, launch["BLOCK_O"]),)](
        current,
        inverse_t,
        pruned.view(torch.int8),
        loss_O,
        columns,
        outputs,
        current.stride(0),
        inverse_t.stride(0),
        pruned.stride(0),
        BLOCK_B=max(triton.next_power_of_2(columns), group),
        GROUP=group,
        PRUNE=group - budget.pattern.keep,
        **launch,
    )
    if current is not current_BO:
        current_BO.copy_(current)
    if pruned is not pruned_BO:
        pruned_BO.copy_(pruned)
    return loss_O.double()
