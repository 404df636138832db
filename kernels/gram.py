"""Gram update: `G += X'X`, lower triangle only, and products of two inputs, accumulated in float32."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Iterable

import torch

from llmprune.kernels import dispatch
from llmprune.kernels.product import product_nt, use_onednn

# Enough stripes that the wasted upper parts of the diagonal blocks cost little,
# few enough that each product stays large: 8 was the knee at d = 2816.
STRIPES = 8
# Rows are cast to float32 this many at a time, which bounds the copy.
ROWS = 8192


def gram_update_(lower_II: torch.Tensor, x_TI: torch.Tensor) -> torch.Tensor:
    """Add `x_TI' x_TI` to the lower triangle of `lower_II` (float32, in place).

    `x_TI` has any float dtype: products of two half-precision values are exact in float32.
    Entries above the diagonal of `lower_II` are left undefined. Half of the matrix costs about
    half of the flops of the full product.
    """
    dispatch.run("gram_update", lower_II, x_TI)
    return lower_II


def gram_updates_(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """`gram_update_` of several, as experts have them: on a GPU one launch for all that can share it.

    Those can that have one width, dtype and device. A Gram matrix that is named again goes to a later launch: within
    one, nobody knows who is first.
    """
    launches: dict[Hashable, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    turns: Counter[int] = Counter()
    for lower_II, x_TI in pairs:
        key = (x_TI.shape[1], x_TI.dtype, x_TI.device, turns[lower_II.data_ptr()])
        turns[lower_II.data_ptr()] += 1
        launches.setdefault(key, []).append((lower_II, x_TI))
    for together in launches.values():
        dispatch.run("gram_update", *itertools.chain.from_iterable(together))


def gram_update_torch_(*operands: torch.Tensor) -> None:
    for lower_II, x_TI in zip(operands[::2], operands[1::2], strict=True):
        _add_stripes(lower_II, x_TI)


def _add_stripes(lower_II: torch.Tensor, x_TI: torch.Tensor) -> None:
    width = lower_II.shape[0]
    stripe = -(-width // STRIPES)
    for rows_TI in x_TI.split(ROWS):
        rows_TI = rows_TI.float()
        if use_onednn(rows_TI.T, rows_TI.T):
            rows_IT = rows_TI.T.contiguous()
            for start in range(0, width, stripe):
                end = min(start + stripe, width)
                lower_II[start:, start:end].add_(product_nt(rows_IT[start:], rows_IT[start:end]))
            continue
        for start in range(0, width, stripe):
            end = min(start + stripe, width)
            lower_II[start:, start:end].addmm_(rows_TI[:, start:].T, rows_TI[:, start:end])


def cross_update_(cross_II: torch.Tensor, y_TI: torch.Tensor, x_TI: torch.Tensor) -> torch.Tensor:
    """Add `y_TI' x_TI` to `cross_II` (float32, in place); both of any float dtype, T x I."""
    for y_rows_TI, x_rows_TI in zip(y_TI.split(ROWS), x_TI.split(ROWS), strict=True):
        y_IT, x_IT = y_rows_TI.float().T, x_rows_TI.float().T
        if use_onednn(y_IT, x_IT):
            y_IT, x_IT = y_IT.contiguous(), x_IT.contiguous()
        cross_II.add_(product_nt(y_IT, x_IT))
    return cross_II
