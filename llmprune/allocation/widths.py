"""How many units of every kind go in every layer, so that a number of parameters goes in all.

A new allocation is a function here and a line in `SPREADS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from llmprune.arch.units import KV_GROUP, QUERY_HEAD, Units
from llmprune.checkpoint.slicing import Place
from llmprune.recipe import nearest
from llmprune.types import UserError

HEADS = (KV_GROUP, QUERY_HEAD)


@dataclass(frozen=True)
class Demand:
    """At least `parameters` are to go from `units`, those of layers that are free to lose some.

    `heads`: the numbers of heads (kv groups, or query heads of each) that may stay in a layer of one kind of output;
    `step`: what the number of channels that stay must divide by.
    """

    units: Mapping[Place, Units]
    parameters: int
    heads: Sequence[int]
    step: int

    @property
    def share(self) -> float:
        """The fraction of the units' parameters that goes."""
        return self.parameters / sum(one.cost * one.count for one in self.units.values())

    def cost(self, counts: Mapping[Place, int]) -> int:
        return sum(one.cost * counts[place] for place, one in self.units.items())


Scores = Mapping[Place, torch.Tensor]


def uniform(demand: Demand, scores: Scores) -> dict[Place, int]:
    """The same number of heads and of channels in every layer: about equal shares of both, the channels making up."""
    return _completed(demand, dict.fromkeys(demand.units, demand.share))


def rising(demand: Demand, scores: Scores) -> dict[Place, int]:
    """Shares that rise with the logarithm of the depth, from half the mean (SlimGPT, Ling et al. 2024, eq. 8)."""
    layers = sorted({place[0] for place in demand.units if place[0] is not None})
    steps = [math.log(number + 1) / math.log(max(len(layers), 2)) for number in range(len(layers))]
    first = 0.5 * demand.share
    slope = (demand.share - first) / (sum(steps) / len(steps)) if any(steps) else 0.0
    shares = {layer: first + slope * step for layer, step in zip(layers, steps, strict=True)}
    return _completed(demand, {place: shares[place[0]] for place in demand.units})


def pooled(demand: Demand, scores: Scores) -> dict[Place, int]:
    """Scores of each place brought to mean 0 and deviation 1, then pooled: the lowest go until enough parameters do.

    An et al. 2024 (FLAP, AAAI), section 4.2, with the true cost of a unit in place of a constant. Where units come in
    strata the mean over them counts, and at least one unit of each stratum stays.
    """
    steps: list[tuple[float, Place]] = []
    for place, one in demand.units.items():
        sorted_SU = _standardised(scores[place]).view(one.strata, -1).sort(dim=1).values
        steps += [(float(score), place) for score in sorted_SU.mean(0)[:-1]]
    counts = dict.fromkeys(demand.units, 0)
    left = demand.parameters
    for _, place in sorted(steps, key=lambda one: one[0]):
        if left <= 0:
            break
        counts[place] += demand.units[place].strata
        left -= demand.units[place].cost * demand.units[place].strata
    if left > 0:
        raise _too_much(demand)
    return counts


class Entry(NamedTuple):
    """A way to spread, and whether it reads the scores of all units in the dense model."""

    spread: Callable[[Demand, Scores], dict[Place, int]]
    scored: bool = False


SPREADS = {"uniform": Entry(uniform), "rising": Entry(rising), "pooled": Entry(pooled, scored=True)}


def spread_of(name: str) -> Entry:
    """The line of the table for a name; raises UserError."""
    if name not in SPREADS:
        raise UserError(f"allocation {name!r} does not spread heads and channels{nearest(name, list(SPREADS))}")
    return SPREADS[name]


def _completed(demand: Demand, shares: Mapping[Place, float]) -> dict[Place, int]:
    """Heads nearest to their share of what may stay, then as few channels less as give what is asked in all."""
    heads = {place: one for place, one in demand.units.items() if place[1] in HEADS}
    rest = {place: one for place, one in demand.units.items() if place not in heads}
    for extra in range(len(demand.heads) + 1):
        counts = {place: _heads_gone(demand, one, shares[place], extra) for place, one in heads.items()}
        missing = demand.parameters - sum(one.cost * counts[place] for place, one in heads.items())
        if missing <= 0:
            return {**dict.fromkeys(rest, 0), **counts}
        weight = sum(shares[place] * one.cost * one.count for place, one in rest.items())
        found = {place: _channels_gone(demand, one, shares[place] * missing / weight) for place, one in rest.items()}
        if rest and all(count is not None for count in found.values()):
            return {**counts, **{place: count for place, count in found.items() if count is not None}}
    raise _too_much(demand)


def _heads_gone(demand: Demand, units: Units, share: float, extra: int) -> int:
    """How many heads go: so that the number nearest to the share stays, or `extra` allowed numbers fewer."""
    allowed = sorted({one for one in (*demand.heads, units.size) if 0 < one <= units.size})
    best = min(range(len(allowed)), key=lambda at: (abs(allowed[at] - (1 - share) * units.size), -allowed[at]))
    return (units.size - allowed[max(best - extra, 0)]) * units.strata


def _channels_gone(demand: Demand, units: Units, share: float) -> int | None:
    """How many channels go for at least a share of them; None if none would stay."""
    # a hair above what is asked is rounding
    left = math.floor((1 - share) * units.size / demand.step + 1e-9) * demand.step
    return (units.size - left) * units.strata if left > 0 else None


def _standardised(score_U: torch.Tensor) -> torch.Tensor:
    score_U = score_U.double()
    deviation = score_U.std(correction=0)
    return (score_U - score_U.mean()) / (deviation if deviation > 0 else 1.0)


def _too_much(demand: Demand) -> UserError:
    most = sum(one.cost * one.count for one in demand.units.values())
    kinds = " and ".join(dict.fromkeys(place[1] for place in demand.units))
    return UserError(
        f"{demand.parameters:,} parameters cannot go: all {kinds}s of the layers that may lose some have {most:,}, and "
        "some must stay in each; ask for less, protect fewer layers, or drop layers instead"
    )
