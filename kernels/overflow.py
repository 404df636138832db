"""Unstructured sparse matrices as a 2:4 matrix and what did not fit into it: an experiment in decoding speed.

Of every four weights along the inputs up to two, the largest, are kept packed (`sparse24`), where sparse tensor cores
reach them; the surplus lies in a list, row after row:

* `values_OV`, `metadata_OB`: the 2:4 part.
* `extra_S`: the surplus weights, in the dtype of the weights, by row and then by column.
* `columns_S`, int16, to be read as unsigned: their columns.
* `starts_O1`, int32, O + 1: where each row begins in `extra_S`, and where the last one ends.

With 16-bit weights that is 0.5625 of the dense bytes and 4 bytes for each weight of the surplus: a random mask at 50 %
leaves 3/32 of the weights over, 0.75 of the dense bytes in all. A bitmask (`bitmask`) is smaller.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from llmprune import masks
from llmprune.kernels import dispatch
from llmprune.kernels.product import product_nt
from llmprune.kernels.sparse24 import STRIPE, pack24, unpack24

# A column must fit 16 bits.
MOST_INPUTS = 1 << 16


class Overflow(NamedTuple):
    """A packed matrix; the layout is that of the module."""

    values_OV: torch.Tensor
    metadata_OB: torch.Tensor
    extra_S: torch.Tensor
    columns_S: torch.Tensor
    starts_O1: torch.Tensor

    @property
    def bytes(self) -> int:
        return sum(one.numel() * one.element_size() for one in self)


def pack_overflow(weight_OI: torch.Tensor) -> Overflow:
    """Pack a matrix of any sparsity; unpacking gives the same numbers. Raises ValueError for sizes that do not fit."""
    inputs = weight_OI.shape[1]
    if inputs % 4 or inputs > MOST_INPUTS:
        raise ValueError(f"{inputs} inputs are no multiple of 4, or more than {MOST_INPUTS}")
    surplus_OI = masks.lowest_per_group(weight_OI.abs(), 2, 4) & (weight_OI != 0)
    starts_O1 = torch.nn.functional.pad(surplus_OI.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    columns_S = surplus_OI.nonzero()[:, 1].to(torch.int16)
    return Overflow(*pack24(weight_OI.masked_fill(surplus_OI, 0)), weight_OI[surplus_OI], columns_S, starts_O1)


def unpack_overflow(packed: Overflow, rows: slice = slice(None)) -> torch.Tensor:
    """The dense matrix, or some of its rows."""
    first, last, _ = rows.indices(len(packed.values_OV))
    weight_OI = unpack24(packed.values_OV[rows], packed.metadata_OB[rows])
    starts_O1 = packed.starts_O1[first : last + 1]
    here = slice(int(starts_O1[0]), int(starts_O1[-1]))
    row_S = torch.repeat_interleave(torch.arange(last - first, device=weight_OI.device), starts_O1.diff())
    weight_OI[row_S, packed.columns_S[here].long() & 0xFFFF] = packed.extra_S[here]
    return weight_OI


def matmul_overflow(x_TI: torch.Tensor, packed: Overflow) -> torch.Tensor:
    """`x_TI @ W'`, T x O, in the dtype of `x_TI`, which must be that of the weights."""
    y_TO: torch.Tensor = dispatch.run("matmul_overflow", x_TI, *packed)
    return y_TO


def matmul_overflow_torch(x_TI: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
    packed = Overflow(*parts)
    outputs, rows = len(packed.values_OV), max(STRIPE // x_TI.shape[1], 1)
    y_TO = x_TI.new_empty(len(x_TI), outputs)
    for start in range(0, outputs, rows):
        here = slice(start, min(start + rows, outputs))
        y_TO[:, here] = product_nt(x_TI, unpack_overflow(packed, here))
    return y_TO
