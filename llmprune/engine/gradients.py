"""Gradients with respect to the weights, one layer at a time.

Held in memory are one layer with its gradients (three times its weights, in float32), and for gradients of the loss
what enters every layer for all tokens: tokens x width x layers values in the model's dtype.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from llmprune.engine.trunk import States, Trunk, token_losses
from llmprune.types import Gradient, in_blocks

# Sums over the batches for some parameters of a layer, by their names in it.
Found = dict[str, Gradient]


def loss_gradients(
    trunk: Trunk, parameters: Sequence[Sequence[str]], *, blocks: bool = False
) -> Iterator[tuple[int, Found]]:
    """Of the mean loss of the next token, for the named parameters of every layer, from the last layer to the first.

    `blocks`: with their products in blocks of weights, `FISHER_BLOCK` values more for each weight of the layer.

    Reads every layer twice: once forwards, keeping what enters it, and once backwards, running it again with autograd
    and handing the gradient of its input on to the layer below. A batch is one sample (see `Gradient`). Yields while
    the layer is loaded.
    """
    entered: list[States] = []
    states = trunk.enter()
    for _, after in trunk.walk(states):
        entered.append(states)
        states = after
    above = [_of_loss(trunk, number, state) for number, state in enumerate(states)]
    for index in reversed(range(trunk.depth)):
        with trunk.loaded(index):
            found, above = _backwards(trunk, index, entered.pop(), above, parameters[index], blocks)
            yield index, found


def regional_gradients(trunk: Trunk, parameters: Sequence[Sequence[str]]) -> Iterator[tuple[int, Found]]:
    """Of the Euclidean norm of each layer's own output, in order; nothing but the layer is run."""
    states = trunk.enter()
    for index, after in trunk.walk(states):
        direction = [torch.nn.functional.normalize(one.flatten(), dim=0).view_as(one) for one in after]
        yield index, _backwards(trunk, index, states, direction, parameters[index])[0]
        states = after


def saliency(trunk: Trunk) -> list[float]:
    """Sum of |w g| over the matrices of every layer; g is the gradient of the mean loss over the calibration text."""
    matrices = [[name for name, one in unit.module.named_parameters() if one.dim() >= 2] for unit in trunk.units]
    totals = [0.0] * trunk.depth
    for index, found in loss_gradients(trunk, matrices):
        module = trunk.units[index].module
        totals[index] = sum(
            float((module.get_parameter(name).detach() * one.mean_OI).abs().sum(dtype=torch.float64))
            for name, one in found.items()
        )
    return totals


def _of_loss(trunk: Trunk, batch: int, state: torch.Tensor) -> torch.Tensor:
    """The gradient of a batch's mean loss with respect to what leaves the last layer."""
    with torch.enable_grad():
        state = state.detach().requires_grad_()
        loss = token_losses(trunk.logits(batch, state), trunk.batches[batch]["input_ids"]).mean()
        return torch.autograd.grad(loss, state)[0]


def _none(parameter: torch.Tensor, blocks: bool) -> Gradient:
    zeros = torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
    rows = in_blocks(zeros) if blocks else None
    outer = None if rows is None else rows.new_zeros(*rows.shape, rows.shape[-1])
    return Gradient(zeros, zeros.clone(), blocks_RNBB=outer)


def _backwards(
    trunk: Trunk, index: int, entered: States, above: States, names: Sequence[str], blocks: bool = False
) -> tuple[Found, States]:
    """Sums for a loaded layer, and the gradients of its inputs, from those of its outputs (`above`)."""
    module = trunk.units[index].module
    parameters = {name: module.get_parameter(name) for name in names}
    found = {name: _none(one, blocks) for name, one in parameters.items()}
    counts = [batch["input_ids"][:, 1:].numel() for batch in trunk.batches]
    below: States = []
    with differentiated(list(parameters.values())):
        for number, (state, cotangent) in enumerate(zip(entered, above, strict=True)):
            with torch.enable_grad():
                leaf = state.detach().requires_grad_()
                output = trunk.apply(index, number, leaf)
                wanted = (leaf, *parameters.values())
                into, *gradients = torch.autograd.grad(output, wanted, cotangent, allow_unused=True)
            below.append(into)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    found[name].add(gradient, counts[number] / sum(counts))
    return found, below


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
