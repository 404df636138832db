"""How sharply the loss bends at the outputs of matrices: Gram matrices of the gradients there, one layer at a time.

Held in memory are one layer, for each matrix in it a square of its outputs in float32, and what enters every layer
for all tokens. No gradient of a weight is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from llmprune.engine.gradients import backwards
from llmprune.engine.observe import Observe, Product
from llmprune.engine.trunk import States, Trunk
from llmprune.kernels.gram import gram_update_

# Gram matrices O x O by the name of a matrix in its layer (`Product.name`), of which the lower triangle is valid.
Grams = dict[str, torch.Tensor]


def output_grams(trunk: Trunk, parameters: Sequence[Sequence[str]]) -> Iterator[tuple[int, Grams]]:
    """Sum over tokens of g g' for the matrices in some parameters of every layer, from the last layer to the first.

    g is the gradient, with respect to what a matrix puts out for one token, of the loss summed over all tokens. A matrix
    that is used several times has the sum over its uses; one that no token reached is left out.
    """
    return backwards(trunk, lambda index, entered, above: _of_layer(trunk, index, entered, above, parameters[index]))


def _of_layer(trunk: Trunk, index: int, entered: States, above: States, names: Sequence[str]) -> tuple[Grams, States]:
    grams: Grams = {}
    below: States = []
    for number, (state, cotangent) in enumerate(zip(entered, above, strict=True)):
        tokens = trunk.batches[number]["input_ids"][:, 1:].numel()

        def follow(products: list[Product], returned: torch.Tensor, tokens: int = tokens) -> None:
            if returned.requires_grad:
                returned.register_hook(lambda gradient: _add(grams, products, gradient * tokens))

        parameters = {name: trunk.units[index].module.get_parameter(name) for name in names}
        with torch.enable_grad(), Observe(parameters, made=follow):
            leaf = state.detach().requires_grad_()
            output = trunk.apply(index, number, leaf)
        below += torch.autograd.grad(output, leaf, cotangent)
    return grams, below


def _add(grams: Grams, products: list[Product], gradient: torch.Tensor) -> None:
    for one in products:
        rows_TO = one.rows(gradient)
        if one.name not in grams:
            grams[one.name] = torch.zeros(rows_TO.shape[1], rows_TO.shape[1], device=rows_TO.device)
        gram_update_(grams[one.name], rows_TO)
