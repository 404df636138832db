"""How many units of every kind go in every layer, so that a number of parameters goes in all.

A new allocation is a function here and a line in `SPREADS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from llmprune.arch.units import KV_GROUP, QUERY_HEAD, Units
from llmprune.checkpoint.slicing import Place
from llmprune.recipe import nearest
from llmprune.types import UserError

HEADS = (KV_GROUP, QUERY_HEAD)
# The kind under which the influence of a whole layer stands among scores: the mean of 1 - cos between what enters and leaves.
LAYER = "layer"
# The share of a layer that may go with `influence`.
MOST = 0.9


@dataclass(frozen=True)
class Demand:
    """At least `parameters` are to go from `units`, those of layers that are free to lose some.

    `heads`: the numbers of heads (kv groups, or query heads of each) that may stay in a layer of one kind of output;
    `step`: what the number of channels that stay must divide by, and that of dimensions, all heads together.
    `temperature`: of `influence`.
    """

    units: Mapping[Place, Units]
    parameters: int
    heads: Sequence[int]
    step: int
    temperature: float = 0.1

    @property
    def share(self) -> float:
        """The fraction of the units' parameters that goes."""
        return self.parameters / sum(one.cost * one.count for one in self.units.values())

    def step_of(self, place: Place) -> int:
        """What the number of units that stay must divide by in each stratum; heads have numbers of their own."""
        one = self.units[place]
        together = one.dimensions * (1 if one.stacked else one.strata)
        return 1 if place[1] in HEADS else self.step // math.gcd(self.step, together)

    def may_stay(self, place: Place) -> list[int]:
        """The numbers of heads that may stay in a layer (in each of its strata), all of them included."""
        size = self.units[place].size
        return sorted({*(one for one in self.heads if one <= size), size}) if place[1] in HEADS else []


Scores = Mapping[Place, torch.Tensor]


def uniform(demand: Demand, scores: Scores) -> dict[Place, int]:
    """The same number of heads and of channels in every layer: about equal shares of both, the channels making up."""
    return _completed(demand, dict.fromkeys(demand.units, demand.share))


def balanced(demand: Demand, scores: Scores) -> dict[Place, int]:
    """As uniform, but the number of heads is the one that costs least: the sum of the scores of what goes is lowest.

    The scores of a layer are taken relative to their sum. They must be of one measure for heads and channels, such as
    the squared error in what the layer writes.
    """
    even = dict.fromkeys(demand.units, demand.share)
    numbers = sorted({one for place in demand.units for one in demand.may_stay(place)}, reverse=True)
    choices = []
    for left in numbers or [0]:
        heads = {place: _nearest(demand.may_stay(place), left, 0) for place in demand.units if place[1] in HEADS}
        counts = _filled(demand, heads, even)
        if counts is not None:
            choices.append((_lost(demand, scores, counts), counts))
    if not choices:
        raise _too_much(demand)
    return min(choices, key=lambda one: one[0])[1]


def rising(demand: Demand, scores: Scores) -> dict[Place, int]:
    """Shares that rise with the logarithm of the depth, from half the mean (SlimGPT, Ling et al. 2024, eq. 8)."""
    layers = sorted({place[0] for place in demand.units if place[0] is not None})
    steps = [math.log(number + 1) / math.log(max(len(layers), 2)) for number in range(len(layers))]
    first = 0.5 * demand.share
    slope = (demand.share - first) / (sum(steps) / len(steps)) if any(steps) else 0.0
    shares = {layer: first + slope * step for layer, step in zip(layers, steps, strict=True)}
    return _completed(demand, {(layer, kind): shares[layer] for layer, kind in demand.units if layer is not None})


def pooled(demand: Demand, scores: Scores) -> dict[Place, int]:
    """Scores of each place brought to mean 0 and deviation 1, then pooled: the lowest go until enough parameters do.

    An et al. 2024 (FLAP, AAAI), section 4.2, with the true cost of a unit in place of a constant. Units go in such numbers
    that what stays is a number that may, by the mean of their scores. Where they come in strata the mean over these counts,
    and at least one unit of each stratum stays.
    """
    steps: list[tuple[float, Place, int]] = []
    for place, one in demand.units.items():
        score_U = _standardised(scores[place]).view(one.strata, -1).sort(dim=1).values.mean(0)
        step = demand.step_of(place)
        allowed = demand.may_stay(place) or [*range(step, one.size, step), one.size]
        for left, before in reversed(list(pairwise(allowed))):
            steps.append((float(score_U[one.size - before : one.size - left].mean()), place, before - left))
    counts = dict.fromkeys(demand.units, 0)
    missing = demand.parameters
    for _, place, each in sorted(steps, key=lambda one: one[0]):
        if missing <= 0:
            break
        counts[place] += each * demand.units[place].strata
        missing -= each * demand.units[place].cost * demand.units[place].strata
    if missing > 0:
        raise _too_much(demand)
    return counts


def influence(demand: Demand, scores: Scores) -> dict[Place, int]:
    """Shares by the softmax of minus the influence of each layer over `temperature`: what turns little loses most.

    Lin et al. 2024 (MoDeGPT, ICLR 2025), section 3.3: of all shares of a mean, those that maximise what the layers that stay
    influence plus `temperature` times the entropy. No layer loses all: shares end at `MOST`, and what lies above
    goes to the others in proportion.
    """
    layers = sorted({place[0] for place in demand.units if place[0] is not None})
    cost_L = torch.tensor(
        [sum(one.cost * one.count for one in demand.units.values() if one.layer == layer) for layer in layers]
    )
    influence_L = torch.stack([scores[(layer, LAYER)].double() for layer in layers])
    wanted_L = torch.softmax(-influence_L / demand.temperature, 0)
    share_L = capped(wanted_L, cost_L.double(), demand.parameters)
    shares = dict(zip(layers, share_L.tolist(), strict=True))
    return _completed(demand, {(layer, kind): shares[layer] for layer, kind in demand.units if layer is not None})


def capped(wanted_L: torch.Tensor, cost_L: torch.Tensor, parameters: float) -> torch.Tensor:
    """Shares in proportion to `wanted_L`, at most `MOST`, with which so many of the parameters `cost_L` go.

    All at `MOST` where that is not enough.
    """
    full_L = torch.zeros(len(wanted_L), dtype=torch.bool)
    while True:
        left = parameters - MOST * float(cost_L[full_L].sum())
        whole = float((wanted_L * cost_L)[~full_L].sum())
        share_L = torch.where(full_L, MOST, wanted_L * (left / whole if whole else 0.0))
        if not bool((share_L > MOST).any()):
            return share_L
        full_L |= share_L > MOST


class Entry(NamedTuple):
    """A way to spread; whether it reads the scores of all units in the dense model; whether a search goes on from it;
    whether these scores are those of layers by their influence.
    """

    spread: Callable[[Demand, Scores], dict[Place, int]]
    scored: bool = False
    searched: bool = False
    influence: bool = False


SPREADS = {
    "uniform": Entry(uniform),
    "balanced": Entry(balanced, scored=True),
    "rising": Entry(rising),
    "pooled": Entry(pooled, scored=True),
    "influence": Entry(influence, scored=True, influence=True),
    "evolutionary": Entry(balanced, scored=True, searched=True),
}


def spread_of(name: str) -> Entry:
    """The line of the table for a name; raises UserError."""
    if name not in SPREADS:
        raise UserError(f"allocation {name!r} does not spread heads and channels{nearest(name, list(SPREADS))}")
    return SPREADS[name]


def _completed(demand: Demand, shares: Mapping[Place, float]) -> dict[Place, int]:
    """Heads nearest to their share of what may stay, then as few channels less as give what is asked in all."""
    allowed = sorted({one for place in demand.units for one in demand.may_stay(place)})
    for extra in range(len(allowed) + 1):
        heads = {
            place: _nearest(demand.may_stay(place), (1 - shares[place]) * one.size, extra)
            for place, one in demand.units.items()
            if place[1] in HEADS
        }
        found = _filled(demand, heads, shares)
        if found is not None:
            return found
    raise _too_much(demand)


def _filled(demand: Demand, heads: Mapping[Place, int], shares: Mapping[Place, float]) -> dict[Place, int] | None:
    """How many units go if these numbers of heads stay and channels give the rest by their shares; None if they cannot."""
    counts = {place: (demand.units[place].size - left) * demand.units[place].strata for place, left in heads.items()}
    missing = demand.parameters - sum(demand.units[place].cost * count for place, count in counts.items())
    rest = {place: one for place, one in demand.units.items() if place not in heads}
    whole = sum(shares[place] * one.cost * one.count for place, one in rest.items())
    if missing > 0 and not rest:
        return None
    for place, one in rest.items():
        share = max(shares[place] * missing / whole, 0.0)
        # what rounding leaves above a multiple is none
        step = demand.step_of(place)
        left = math.floor((1 - share) * one.size / step + 1e-9) * step if share else one.size
        if left <= 0:
            return None
        counts[place] = (one.size - left) * one.strata
    return counts


def _nearest(allowed: Sequence[int], wanted: float, extra: int) -> int:
    """The allowed number nearest to what is wanted (of two the larger), or `extra` allowed numbers below it."""
    best = min(range(len(allowed)), key=lambda at: (abs(allowed[at] - wanted), -allowed[at]))
    return allowed[max(best - extra, 0)]


def _lost(demand: Demand, scores: Scores, counts: Mapping[Place, int]) -> float:
    """The scores of what goes, relative to those of all units of the layer."""
    whole: dict[int | None, float] = {}
    lost: dict[int | None, float] = {}
    for place, one in demand.units.items():
        sorted_SU = scores[place].double().view(one.strata, -1).sort(dim=1).values
        whole[place[0]] = whole.get(place[0], 0.0) + float(sorted_SU.sum())
        gone = float(sorted_SU[:, : counts[place] // one.strata].sum())
        lost[place[0]] = lost.get(place[0], 0.0) + gone
    return sum(lost[layer] / whole[layer] for layer in whole if whole[layer] > 0)


def _standardised(score_U: torch.Tensor) -> torch.Tensor:
    score_U = score_U.double()
    deviation = score_U.std(correction=0)
    return (score_U - score_U.mean()) / (deviation if deviation > 0 else 1.0)


def _too_much(demand: Demand) -> UserError:
    most = sum(one.cost * one.count for one in demand.units.values())
    kinds = " and ".join(dict.fromkeys(place[1] for place in demand.units))
    return UserError(
        f"{demand.parameters:,} parameters cannot go: all {kinds}s of the layers that may lose some have {most:,}, and "
        f"some must stay in each, by steps of width.round_to={demand.step}; ask for less, protect fewer layers, or drop "
        "layers instead"
    )
