"""How far the hidden state turns from one layer to a later one, in one pass."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch

from llmprune.engine.trunk import States, Trunk

# The heat map compares every pair of states, on at most so many tokens: all of them would have to be kept.
HEAT_TOKENS = 512


@dataclass(frozen=True)
class Turns:
    """Means over tokens between the states k and k + span (state k enters layer k, the last one leaves the last).

    `cosine_distance[k]`: 1 - cos. `angle[k]`: arccos(cos) / pi. `heat[k][j]`: cosine of the states k and j
    on a sample of tokens.
    """

    cosine_distance: list[float]
    angle: list[float]
    heat: list[list[float]]


def turns(trunk: Trunk, span: int, *, last_token: bool = False) -> Turns:
    """Compare all states that lie `span` layers apart, over all tokens or the last of each sequence.

    Holds span + 1 states and the weights of one layer. Distances come from |a - b| of unit vectors,
    which is exact to rounding where 1 - cos would cancel.
    """
    ring: deque[list[torch.Tensor]] = deque(maxlen=span + 1)
    samples: list[torch.Tensor] = []
    found: list[tuple[float, float]] = []

    def take(states: States) -> None:
        units = [_unit_vectors(one[:, -1:] if last_token else one) for one in states]
        ring.append(units)
        samples.append(_sample(units))
        if len(ring) == span + 1:
            found.append(_distances(ring[0], ring[-1]))

    entering = trunk.enter()
    take(entering)
    for _, leaving in trunk.walk(entering):
        take(leaving)
    stacked_STD = torch.stack(samples)
    heat_SS = torch.einsum("std,rtd->sr", stacked_STD, stacked_STD) / stacked_STD.shape[1]
    return Turns([one for one, _ in found], [one for _, one in found], heat_SS.tolist())


def distance(first: States, second: States) -> float:
    """Mean 1 - cos over all tokens of two lists of hidden states."""
    return _distances([_unit_vectors(one) for one in first], [_unit_vectors(one) for one in second])[0]


def _unit_vectors(state: torch.Tensor) -> torch.Tensor:
    x_TD = state.flatten(0, 1).float()
    norms_T1: torch.Tensor = x_TD.norm(dim=1, keepdim=True)
    return x_TD / norms_T1.clamp_min(torch.finfo(torch.float32).tiny)


def _distances(first: list[torch.Tensor], second: list[torch.Tensor]) -> tuple[float, float]:
    """Mean 1 - cos and mean angle / pi of pairs of unit vectors."""
    cosine = angle = 0.0
    count = 0
    for a_TD, b_TD in zip(first, second, strict=True):
        chord_T = (a_TD - b_TD).norm(dim=1).double()
        cosine += float((chord_T.square() / 2).sum())
        angle += float((2 * torch.asin((chord_T / 2).clamp_max(1.0)) / math.pi).sum())
        count += len(chord_T)
    return cosine / count, angle / count


def _sample(units: list[torch.Tensor]) -> torch.Tensor:
    """Tokens spread evenly over all batches, the same for every state."""
    total = sum(len(one) for one in units)
    step = max(1, -(-total // HEAT_TOKENS))
    return torch.cat([one[::step] for one in units])
