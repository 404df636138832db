"""How a budget is spread over the matrices of a model. A new allocator is a file and a line here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module

import torch

from llmprune.recipe import nearest
from llmprune.types import Budget, MatrixSpec, UserError

# Goes through the model once and yields every matrix with its float32 weights, outputs x inputs.
Weights = Callable[[], Iterable[tuple[MatrixSpec, torch.Tensor]]]
Allocator = Callable[[list[MatrixSpec], Budget, Weights], dict[str, Budget]]

ALLOCATORS = {
    "uniform": "llmprune.allocation.uniform:uniform",
    "global": "llmprune.allocation.global_magnitude:global_magnitude",
}


def allocator(name: str) -> Allocator:
    """The allocator behind a name; raises UserError."""
    if name not in ALLOCATORS:
        raise UserError(f"unknown allocation {name!r}{nearest(name, list(ALLOCATORS))}")
    module, _, attribute = ALLOCATORS[name].partition(":")
    found: Allocator = getattr(import_module(module), attribute)
    return found
