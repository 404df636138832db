"""What needs the whole model and its gradients in memory at once."""

from __future__ import annotations

import torch

from llmprune.engine.trunk import Trunk, token_losses


def saliency(trunk: Trunk) -> list[float]:
    """Sum of |w g| over the matrices of every layer; g is the gradient of the mean loss over the calibration text.

    Holds all layers and their gradients: twice the size of the model.
    """
    layers = [unit.module for unit in trunk.units]
    batches = trunk.batches
    predicted = sum(batch["input_ids"][:, 1:].numel() for batch in batches)
    with trunk.loaded(*range(trunk.depth)):
        matrices = [[one for one in layer.parameters() if one.dim() >= 2] for layer in layers]
        before = [[one.requires_grad for one in some] for some in matrices]
        for some in matrices:
            for one in some:
                one.requires_grad_(True)
        try:
            with torch.enable_grad():
                for batch in batches:
                    logits = trunk.model(**batch, use_cache=False).logits
                    (token_losses(logits, batch["input_ids"]).sum() / predicted).backward()
            return [
                sum(
                    float((one.detach() * one.grad).abs().sum(dtype=torch.float64))
                    for one in some
                    if one.grad is not None
                )
                for some in matrices
            ]
        finally:
            for some, flags in zip(matrices, before, strict=True):
                for one, flag in zip(some, flags, strict=True):
                    one.grad = None
                    one.requires_grad_(flag)
