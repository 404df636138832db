"""Random sparse matrices."""

from __future__ import annotations

import torch

from llmprune import masks


def two_of_four(outputs: int, inputs: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """A random matrix that keeps the two largest weights of every four."""
    dense = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return dense.masked_fill(masks.lowest_per_group(dense.float().abs(), 2, 4), 0)


def unstructured(outputs: int, inputs: int, sparsity: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A random matrix of which about `sparsity` is zero; its first row is dense, its last empty."""
    generator = torch.Generator().manual_seed(1)
    dense = torch.randn(outputs, inputs, generator=generator)
    zero = torch.rand(outputs, inputs, generator=generator) < sparsity
    zero[0], zero[-1] = False, True
    return dense.masked_fill(zero, 0).to(dtype)
