"""Gradients with respect to the weights, or to gates on units, one layer at a time.

Held in memory are one layer with its gradients (three times its weights, in float32), and for gradients of the loss
what enters every layer for all tokens: tokens x width x layers values in the model's dtype.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import nn

from llmprune.arch.units import Units
from llmprune.checkpoint.slicing import Place
from llmprune.engine.gates import gated
from llmprune.engine.trunk import States, Trunk, token_losses
from llmprune.types import Gradient, in_blocks

# Sums over the batches for some parameters of a layer, by their names in it.
Found = dict[str, Gradient]
Result = TypeVar("Result")
# Of a batch's logits and its token ids: the tokens whose likelihood counts, in place of the ids.
Labels = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def loss_gradients(
    trunk: Trunk, parameters: Sequence[Sequence[str]], outside: Sequence[str] = (), *, blocks: bool = False
) -> Iterator[tuple[int, Found]]:
    """Of the mean loss of the next token, for the named parameters of every layer, from the last layer to the first.

    A batch is one sample (see `Gradient`). Yields while the layer is loaded. Then those of parameters `outside` the
    layers, if any, by their whole names, as of layer -1.

    `blocks`: with their products in blocks of weights, `FISHER_BLOCK` values more for each weight of the layer.
    """
    final, below = yield from backwards(
        trunk, lambda index, entered, above: _backwards(trunk, index, entered, above, parameters[index], blocks)
    )
    if outside:
        yield -1, _outside(trunk, final, below, outside)


def squared_gates(trunk: Trunk, units: Iterable[Units], labels: Labels | None = None) -> dict[Place, torch.Tensor]:
    """The sum over sequences of (dL / dm)^2 by place, U long in float64, m being a factor on a unit.

    L is the mean negative log likelihood, over the tokens of a sequence, of the next token, or of `labels`.
    """
    places = list(units)
    if any(one.stacked for one in places):
        trunk = trunk.rows()  # a factor on an expert's unit is one for the whole batch
    # of each sequence's own loss, not of its share in a batch
    sizes = [len(batch["input_ids"]) for batch in trunk.batches]
    size_B = torch.tensor([size for size in sizes for _ in range(size)], dtype=torch.float64)
    return {
        (one.layer, one.kind): (gradient_BU.double().cpu() * size_B[:, None]).square().sum(0)
        for _, found in gate_gradients(trunk, places, labels)
        for one, gradient_BU in found
    }


def gate_gradients(
    trunk: Trunk, units: Iterable[Units], labels: Labels | None = None
) -> Iterator[tuple[int, list[tuple[Units, torch.Tensor]]]]:
    """Of each batch's mean loss, with respect to a factor on every unit of every sequence: the batches joined, B x U."""
    places = list(units)

    def through(index: int, entered: States, above: States) -> tuple[list[tuple[Units, torch.Tensor]], States]:
        here = [one for one in places if one.layer == index]
        rows: list[tuple[torch.Tensor, ...]] = []
        below: States = []
        for number, (state, cotangent) in enumerate(zip(entered, above, strict=True)):
            with torch.enable_grad():
                leaf = state.detach().requires_grad_()
                gates = [torch.ones(len(leaf), one.count, device=leaf.device, requires_grad=True) for one in here]
                with gated(
                    trunk.model, here, {(one.layer, one.kind): gate for one, gate in zip(here, gates, strict=True)}
                ):
                    output = trunk.apply(index, number, leaf)
                into, *gradients = torch.autograd.grad(output, (leaf, *gates), cotangent)
            below.append(into)
            rows.append(tuple(gradients))
        return [(one, torch.cat(parts)) for one, parts in zip(here, zip(*rows, strict=True), strict=True)], below

    yield from backwards(trunk, through, labels)


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


def backwards(
    trunk: Trunk, through: Callable[[int, States, States], tuple[Result, States]], labels: Labels | None = None
) -> Generator[tuple[int, Result], None, tuple[States, States]]:
    """Go through the layers from the last to the first with the gradient of the loss of the next token, or of `labels`.

    Reads every layer twice: once forwards, keeping what enters it, and once backwards, where `through` runs it again with
    autograd. That takes its number, what enters it and the gradients of what leaves it; it gives what is yielded and
    the gradients of what enters. Yields while the layer is loaded. Returns what leaves the last layer, and the
    gradients of what enters the first.
    """
    entered: list[States] = []
    states = trunk.enter()
    for _, after in trunk.walk(states):
        entered.append(states)
        states = after
    above = [_of_loss(trunk, number, state, labels) for number, state in enumerate(states)]
    for index in reversed(range(trunk.depth)):
        with trunk.loaded(index):
            found, above = through(index, entered.pop(), above)
            yield index, found
    return states, above


def _outside(trunk: Trunk, final: States, below: States, names: Sequence[str]) -> Found:
    """Gradients of parameters by which the loss is read from `final`, or the first layer's input made, or both."""
    parameters = trunk.outside(names)
    found = {name: _none(one) for name, one in parameters.items()}
    shares = _shares(trunk)
    with differentiated(list(parameters.values())):
        for number, (state, cotangent) in enumerate(zip(final, below, strict=True)):
            with torch.enable_grad():
                loss = token_losses(trunk.logits(number, state), trunk.batches[number]["input_ids"]).mean()
                entered = trunk.entering(number)
                total = loss + (entered * cotangent).sum()
                gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    found[name].add(gradient, shares[number])
    return found


def _shares(trunk: Trunk) -> list[float]:
    """The share of each batch in all tokens that are predicted."""
    counts = [batch["input_ids"][:, 1:].numel() for batch in trunk.batches]
    return [count / sum(counts) for count in counts]


def _of_loss(trunk: Trunk, batch: int, state: torch.Tensor, labels: Labels | None) -> torch.Tensor:
    """The gradient of a batch's mean loss with respect to what leaves the last layer."""
    ids = trunk.batches[batch]["input_ids"]
    with torch.enable_grad():
        state = state.detach().requires_grad_()
        logits = trunk.logits(batch, state)
        wanted = ids if labels is None else labels(logits.detach(), ids)
        return torch.autograd.grad(token_losses(logits, wanted).mean(), state)[0]


def _none(parameter: torch.Tensor, blocks: bool = False) -> Gradient:
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
    shares = _shares(trunk)
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
                    found[name].add(gradient, shares[number])
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
