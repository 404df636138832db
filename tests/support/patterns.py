"""Random sparse matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmprune import masks


def two_of_four(outputs: int, inputs: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """A random matrix that keeps the two largest weights of every four."""
    dense = _random(torch.randn, outputs, inputs, torch.Generator().manual_seed(seed)).to(dtype)
    return dense.masked_fill(masks.lowest_per_group(dense.float().abs(), 2, 4), 0)


def unstructured(outputs: int, inputs: int, sparsity: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A random matrix of which about `sparsity` is zero; its first row is dense, its last empty."""
    generator = torch.Generator().manual_seed(1)
    dense = _random(torch.randn, outputs, inputs, generator)
    zero = _random(torch.rand, outputs, inputs, generator) < sparsity
    zero[0], zero[-1] = False, True
    return dense.masked_fill(zero, 0).to(dtype)


def _random(draw: Callable[..., torch.Tensor], outputs: int, inputs: int, generator: torch.Generator) -> torch.Tensor:
    """The same numbers on every device."""
    return draw(outputs, inputs, generator=generator, device="cpu").to(torch.get_default_device())
