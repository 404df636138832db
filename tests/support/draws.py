"""Random numbers that a seed decides."""

from __future__ import annotations

import torch


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Drawn in float32, then rounded."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
