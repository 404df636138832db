"""How far variants of a model, with other values of some matrices, are from the model itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from llmprune.engine.trunk import States, Trunk
from llmprune.types import MatrixSpec
from llmprune.weights import swapped

# A variant: given the matrices of a layer, those that have other values, by name, as their parameters hold them.
Variant = Callable[[Sequence[MatrixSpec]], Mapping[str, torch.Tensor]]


def divergences(trunk: Trunk, variants: Sequence[Variant]) -> list[float]:
    """The mean over all tokens of KL(model || variant) of the next token, in nats, for each variant.

    All variants go through the layers together, so that weights are read once. Holds one layer and the hidden states of
    all variants.
    """
    dense = trunk.enter()
    states: list[States] = [dense] * len(variants)
    for index, unit in enumerate(trunk.units):
        with trunk.loaded(index):
            for number, variant in enumerate(variants):
                with swapped(unit, variant(unit.matrices)):
                    states[number] = trunk.run(index, states[number])
            dense = trunk.run(index, dense)
    totals, count = [0.0] * len(variants), 0
    for batch, state in enumerate(dense):
        logp = trunk.logits(batch, state).float().log_softmax(-1)
        count += logp.shape[:-1].numel()
        for number, one in enumerate(states):
            logq = trunk.logits(batch, one[batch]).float().log_softmax(-1)
            totals[number] += float((logp.exp() * (logp - logq)).sum(dtype=torch.float64))
    return [total / count for total in totals]
