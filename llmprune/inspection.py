"""What a checkpoint really holds: zeros and patterns, counted from the bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch

from llmprune.checkpoint.source import Checkpoint, resolve

# The N:M patterns that hardware or kernels know.
KNOWN_PATTERNS = ((1, 4), (2, 4), (4, 8))


def inspect(model: str) -> dict[str, Any]:
    """Zeros and pattern of every matrix of a model folder, and totals. Raises UserError."""
    checkpoint = Checkpoint(resolve(model))
    rows, params, zeros, size = [], 0, 0, 0
    for name, tensor in checkpoint.tensors():
        entry = checkpoint.entries[name]
        found = int((tensor == 0).sum())
        params, zeros, size = params + tensor.numel(), zeros + found, size + entry.bytes
        if tensor.dim() >= 2:
            rows.append(
                {
                    "name": name,
                    "shape": list(entry.shape),
                    "dtype": str(entry.dtype).removeprefix("torch."),
                    "sparsity": found / tensor.numel(),
                    "pattern": pattern_of(tensor),
                }
            )
    return {"model": model, "tensors": rows, "totals": {"params": params, "zeros": zeros, "bytes": size}}


def zeros_of_layers(tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
    """How many weights are zero in the matrices of the layers, which are those with a number in their name."""
    return sum(int((one == 0).sum()) for name, one in tensors if one.dim() > 1 and re.search(r"\.\d+\.", name))


def pattern_of(tensor: torch.Tensor) -> str:
    """The tightest known N:M pattern that holds along the last axis (or, for Conv1D, the one before), else ""."""
    for keep, group in KNOWN_PATTERNS:
        for axis, note in ((-1, ""), (-2, " (along axis -2)")):
            if tensor.shape[axis] % group == 0:
                kept = (tensor != 0).movedim(axis, -1).unflatten(-1, (-1, group)).sum(-1)
                if int(kept.max()) <= keep:
                    return f"{keep}:{group}{note}"
    return ""
