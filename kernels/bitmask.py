"""Unstructured sparse matrices: the weights that are not zero, and one bit for each place.

Layout of a matrix of O outputs and I inputs, W = ceil(I/32):

* `values_V`: what is not zero, row after row, in the dtype of the weights.
* `words_OW`, int32: bit b of word w says whether column 32 w + b is kept.
* `offsets_OW`, int16, to be read as unsigned: how many weights of the row lie before word w.
* `starts_O1`, int64, O + 1: where each row begins in `values_V`, and where the last one ends.

With 16-bit weights that is 1 - sparsity + 1.5/16 of the dense bytes: 0.594 at 50 %, 0.394 at 70 %. It saves
memory. It is not expected to save time: finding a weight costs more instructions than reading a zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from llmprune.kernels import dispatch
from llmprune.kernels.product import product_nt

# An offset must fit 16 bits.
MOST_INPUTS = 1 << 16
# Weights that the torch form expands at a time, which bounds its scratch memory.
STRIPE = 1 << 24


class Bitmask(NamedTuple):
    """A packed matrix; the layout is that of the module."""

    values_V: torch.Tensor
    words_OW: torch.Tensor
    offsets_OW: torch.Tensor
    starts_O1: torch.Tensor
    inputs: int

    @property
    def bytes(self) -> int:
        return sum(one.numel() * one.element_size() for one in self[:4])


def pack_bitmask(weight_OI: torch.Tensor) -> Bitmask:
    """Pack a matrix of any float dtype; unpacking gives the same bits. Raises ValueError if it is too wide."""
    inputs = weight_OI.shape[1]
    if inputs > MOST_INPUTS:
        raise ValueError(f"{inputs} inputs are more than {MOST_INPUTS}, which the 16-bit offsets can count")
    # a negative zero counts as a weight, so that nothing is lost
    kept_OI = (weight_OI != 0) | torch.signbit(weight_OI)
    kept_OW32 = torch.nn.functional.pad(kept_OI, (0, -inputs % 32)).unflatten(1, (-1, 32))
    bit_8 = 2 ** torch.arange(8, dtype=torch.uint8, device=weight_OI.device)
    bytes_OW4 = (kept_OW32.unflatten(2, (4, 8)) * bit_8).sum(-1, dtype=torch.uint8)
    counts_OW = kept_OW32.sum(-1)
    ends_OW = counts_OW.cumsum(1)
    starts_O1 = torch.nn.functional.pad(ends_OW[:, -1].cumsum(0), (1, 0))
    words_OW = bytes_OW4.view(torch.int32).squeeze(-1)
    return Bitmask(weight_OI[kept_OI], words_OW, (ends_OW - counts_OW).to(torch.int16), starts_O1, inputs)


def unpack_bitmask(packed: Bitmask, rows: slice = slice(None)) -> torch.Tensor:
    """The dense matrix, or some of its rows."""
    words_OW = packed.words_OW[rows]
    first, last, _ = rows.indices(len(packed.words_OW))
    bit_8 = 2 ** torch.arange(8, dtype=torch.uint8, device=words_OW.device)
    kept_OI = ((words_OW.view(torch.uint8)[..., None] & bit_8) != 0).flatten(1)[:, : packed.inputs]
    weight_OI = packed.values_V.new_zeros(kept_OI.shape)
    weight_OI[kept_OI] = packed.values_V[packed.starts_O1[first] : packed.starts_O1[last]]
    return weight_OI


def matmul_bitmask(x_TI: torch.Tensor, packed: Bitmask) -> torch.Tensor:
    """`x_TI @ W'`, T x O, in the dtype of `x_TI`, which must be that of the weights."""
    y_TO: torch.Tensor = dispatch.run("matmul_bitmask", x_TI, *packed)
    return y_TO


def matmul_bitmask_torch(x_TI: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
    packed = Bitmask(*parts)  # type: ignore[arg-type]
    outputs = len(packed.words_OW)
    rows = max(STRIPE // packed.inputs, 1)
    y_TO = x_TI.new_empty(len(x_TI), outputs)
    for start in range(0, outputs, rows):
        here = slice(start, start + rows)
        y_TO[:, here] = product_nt(x_TI, unpack_bitmask(packed, here))
    return y_TO
