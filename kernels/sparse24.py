"""2:4 sparse matrices: of every four weights along the inputs at most two are not zero.

Layout of a matrix of O outputs and I inputs (I a multiple of 4), natural order throughout:

* `values_OV`, O x I/2, the dtype of the weights: the two kept weights of every group, lower column first.
* `metadata_OB`, O x ceil(I/8), uint8: one nibble a group, `first | second << 2` with the columns (0 to 3, first <
  second) of the two; the group of lower columns is in the lower nibble. Read as little-endian words, the nibbles
  stand in the order that PTX prescribes for the metadata of `mma.sp`.

With 16-bit weights that is 9/16 = 0.5625 of the dense bytes where 8 divides I. A group with fewer than two weights
keeps zeros to make two, so packing and unpacking give the same numbers back (a negative zero that found no place
comes back as zero).
"""

from __future__ import annotations

import itertools

import torch

from llmprune import masks
from llmprune.kernels import dispatch, eligibility
from llmprune.kernels.product import product_nt

# Weights that the torch form expands at a time, which bounds its scratch memory.
STRIPE = 1 << 24
# The nibble of every set of kept columns, a set being a sum of these bits; only the six sets of two occur.
_BIT = torch.tensor([1, 2, 4, 8], dtype=torch.uint8)
_NIBBLE = torch.zeros(16, dtype=torch.uint8)
for _first, _second in itertools.combinations(range(4), 2):
    _NIBBLE[(1 << _first) + (1 << _second)] = _first | _second << 2


def why_not_24(weight_OI: torch.Tensor) -> str | None:
    """None if the matrix is 2:4 along its inputs, else the reason why not."""
    if weight_OI.dim() != 2 or not weight_OI.is_floating_point():
        return "no matrix of floats"
    inputs = weight_OI.shape[1]
    if inputs % 4:
        return f"its {inputs} inputs are no multiple of 4"
    broken = int((torch.count_nonzero(weight_OI.unflatten(1, (-1, 4)), -1) > 2).sum())
    return f"{broken} of its groups of 4 keep more than 2 weights" if broken else None


def pack24(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`values_OV` and `metadata_OB` of a 2:4 matrix; raises ValueError if it is none."""
    reason = why_not_24(weight_OI)
    if reason is not None:
        raise ValueError(f"the matrix is not 2:4: {reason}")
    # what is not zero is kept first, then negative zeros
    rank_OI = (weight_OI != 0).to(torch.uint8) * 2 + torch.signbit(weight_OI)
    kept_OI = ~masks.lowest_per_group(rank_OI, 2, 4)
    code_OG = (kept_OI.unflatten(1, (-1, 4)) * _BIT.to(weight_OI.device)).sum(-1)
    nibble_OG = _NIBBLE.to(weight_OI.device)[code_OG]
    if nibble_OG.shape[1] % 2:
        nibble_OG = torch.nn.functional.pad(nibble_OG, (0, 1))
    values_OV = weight_OI[kept_OI].view(len(weight_OI), -1)
    return values_OV, nibble_OG[:, 0::2] | nibble_OG[:, 1::2] << 4


def unpack24(values_OV: torch.Tensor, metadata_OB: torch.Tensor) -> torch.Tensor:
    """The dense matrix, O x I, in the dtype of its values."""
    weight_OI: torch.Tensor = dispatch.run("unpack24", values_OV, metadata_OB)
    return weight_OI


def unpack24_torch(values_OV: torch.Tensor, metadata_OB: torch.Tensor) -> torch.Tensor:
    pairs_OG2 = values_OV.unflatten(1, (-1, 2))
    nibble_OG = torch.stack((metadata_OB & 15, metadata_OB >> 4), -1).flatten(1)[:, : pairs_OG2.shape[1]]
    low_OG, high_OG = pairs_OG2.unbind(-1)
    first_OG, second_OG = nibble_OG & 3, nibble_OG >> 2
    weight_OG4 = values_OV.new_zeros(*low_OG.shape, 4)
    for column in range(4):
        weight_OG4[..., column] = torch.where(first_OG == column, low_OG, weight_OG4[..., column])
        weight_OG4[..., column] = torch.where(second_OG == column, high_OG, weight_OG4[..., column])
    return weight_OG4.flatten(1)


def compress24(weight_OI: torch.Tensor) -> torch.Tensor:
    """A 2:4 matrix in cuSPARSELt's form: values, then metadata in an order of its own, 9/16 of the dense bytes."""
    return torch._cslt_compress(weight_OI)


def matmul24_cusparselt(
    x_TI: torch.Tensor, values_OV: torch.Tensor, metadata_OB: torch.Tensor, compressed: torch.Tensor
) -> torch.Tensor:
    """The sparse matrix must be the first factor, so the product is computed, and stored, transposed."""
    tokens = len(x_TI)
    padded_TI = torch.nn.functional.pad(x_TI, (0, 0, 0, -tokens % eligibility.CUSPARSELT_TOKENS))
    return torch._cslt_sparse_mm(compressed, padded_TI.T, transpose_result=True)[:tokens]


def matmul24_torch(
    x_TI: torch.Tensor,
    values_OV: torch.Tensor,
    metadata_OB: torch.Tensor,
    compressed: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x_TI @ W'`, expanding some rows of W at a time. Saves memory, not time."""
    rows = max(STRIPE // x_TI.shape[1], 1)
    if len(values_OV) <= rows:
        return product_nt(x_TI, unpack24(values_OV, metadata_OB))
    y_TO = x_TI.new_empty(len(x_TI), len(values_OV))
    for start in range(0, len(values_OV), rows):
        here = slice(start, start + rows)
        y_TO[:, here] = product_nt(x_TI, unpack24(values_OV[here], metadata_OB[here]))
    return y_TO


@torch.library.custom_op("llmprune::matmul24", mutates_args=())
def matmul24(
    x_TI: torch.Tensor,
    values_OV: torch.Tensor,
    metadata_OB: torch.Tensor,
    compressed: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x_TI @ W'` with a packed W, T x O, in the dtype of `x_TI`, which must be that of the values.

    `compressed`: W once more, by `compress24`, for many tokens. An operator of torch, so that torch.compile and CUDA
    graphs take it whole. Differentiable in `x_TI`.
    """
    y_TO: torch.Tensor = dispatch.run("matmul24", x_TI, values_OV, metadata_OB, compressed)
    return y_TO


@matmul24.register_fake
def _(
    x_TI: torch.Tensor,
    values_OV: torch.Tensor,
    metadata_OB: torch.Tensor,
    compressed: torch.Tensor | None = None,
) -> torch.Tensor:
    return x_TI.new_empty(x_TI.shape[0], values_OV.shape[0])


@torch.library.custom_op("llmprune::input_gradient24", mutates_args=())
def input_gradient24(grad_TO: torch.Tensor, values_OV: torch.Tensor, metadata_OB: torch.Tensor) -> torch.Tensor:
    """`grad_TO @ W`: the sum runs over the outputs, where W has no pattern, so W is expanded for it."""
    return grad_TO @ unpack24(values_OV, metadata_OB)


@input_gradient24.register_fake
def _(grad_TO: torch.Tensor, values_OV: torch.Tensor, metadata_OB: torch.Tensor) -> torch.Tensor:
    return grad_TO.new_empty(grad_TO.shape[0], values_OV.shape[1] * 2)


def _keep_weights(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[torch.Tensor, ...], output: object) -> None:
    ctx.save_for_backward(*inputs[1:3])


def _backward(ctx: torch.autograd.function.FunctionCtx, grad_TO: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    values_OV, metadata_OB = ctx.saved_tensors  # type: ignore[attr-defined]
    return input_gradient24(grad_TO, values_OV, metadata_OB), None, None, None


matmul24.register_autograd(_backward, setup_context=_keep_weights)
