"""Random sparse matrices."""

from __future__ import annotations

import torch

from llmprune import masks


def two_of_four(outputs: int, inputs: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """A random matrix that keeps the two largest weights of every four."""
    dense = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return dense.masked_fill(masks.lowest_per_group(dense.float().abs(), 2, 4), 0)
