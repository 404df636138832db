"""What needs the whole model and its gradients in memory at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from llmprune.engine.trunk import Trunk, token_losses


def saliency(trunk: Trunk) -> list[float]:
    """Sum of |w g| over the matrices of every layer; g is the gradient of the mean loss over the calibration text.

    Holds all layers and their gradients: twice the size of the model.
    """
    layers = [unit.module for unit in trunk.units]
    with trunk.loaded(*range(trunk.depth)):
        matrices = [[one for one in layer.parameters() if one.dim() >= 2] for layer in layers]
        with differentiated([one for some in matrices for one in some]):
            backward(trunk, trunk.batches)
            return [
                sum(
                    float((one.detach() * one.grad).abs().sum(dtype=torch.float64))
                    for one in some
                    if one.grad is not None
                )
                for some in matrices
            ]


@contextlib.contextmanager
def differentiated(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """While active, these parameters get gradients; afterwards they have none, and the flags that they had."""
    before = [one.requires_grad for one in parameters]
    for one in parameters:
        one.requires_grad_(True)
    try:
        yield
    finally:
        for one, flag in zip(parameters, before, strict=True):
            one.grad = None
            one.requires_grad_(flag)


def backward(trunk: Trunk, batches: Sequence[dict[str, torch.Tensor]]) -> None:
    """Add the gradient of the mean loss over some batches; the layers must be loaded."""
    predicted = sum(batch["input_ids"][:, 1:].numel() for batch in batches)
    with torch.enable_grad():
        for batch in batches:
            logits = trunk.model(**batch, use_cache=False).logits
            (token_losses(logits, batch["input_ids"]).sum() / predicted).backward()  # type: ignore[no-untyped-call]


def sequences(trunk: Trunk) -> Iterator[dict[str, torch.Tensor]]:
    """The calibration text one sequence at a time."""
    for batch in trunk.batches:
        for start in range(len(batch["input_ids"])):
            yield {key: one[start : start + 1] for key, one in batch.items()}
