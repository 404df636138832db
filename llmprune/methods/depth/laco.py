"""LaCo: collapse runs of layers into the first of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llmprune.checkpoint.surgery import Surgery
from llmprune.engine.similarity import distance
from llmprune.engine.trunk import States, Trunk, holding
from llmprune.methods.structural import TEXT, Decision, Drop
from llmprune.types import UserError

# A layer of the collapsed model as a linear combination of the old ones: coefficients by old index.
Mixture = dict[int, float]
# By how much the threshold sinks when a descent has not removed enough.
STEP = 0.05


@dataclass(frozen=True)
class LaCo:
    """theta_l + sum_k (theta_{l+k} - theta_l), from the top layer down, wherever the final states stay similar.

    Yang et al. 2024, "LaCo: Large Language Model Pruning via Layer Collapse", eq. 1 and algorithm 1. Deviations: the
    number of layers is what the user asks for, so the last collapse may be a smaller one, and where a descent ends
    early the threshold sinks by 0.05 and it begins again (the report has the value used); the similarity is the mean
    cosine over all tokens.

    `merge`: layers collapsed into one at a time. `threshold`: least similarity of the final states. `interval`:
    layers passed over after a collapse. `sequences`: how many of the calibration sequences are used.
    """

    merge: int = 2
    threshold: float = 0.8
    interval: int = 2
    sequences: int = 8

    kind: ClassVar[str] = "depth"
    needs: ClassVar[frozenset[str]] = frozenset({TEXT})
    patterns: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2402.11187"
    takes_list: ClassVar[bool] = False
    memory: ClassVar[str] = "merge + 2 layers, the changed layers, and the states of a few sequences at every layer"

    def __post_init__(self) -> None:
        if self.merge < 1 or self.interval < 1 or self.sequences < 1:
            raise ValueError("merge, interval and sequences must be at least 1")

    def decide(self, trunk: Trunk, drop: Drop) -> Decision:
        few = trunk.first(self.sequences)
        entering = few.enter()
        dense = [entering, *(states for _, states in few.walk(entering))]
        threshold = self.threshold
        while True:
            mixtures, accepted = self._descend(few, drop, dense, threshold)
            if drop.depth - len(mixtures) == drop.count:
                break
            if threshold <= -1:
                raise UserError(f"laco cannot collapse {drop.count} of {drop.depth} layers with merge={self.merge}")
            threshold -= STEP
        bases = [base for base, _ in mixtures]
        replaced = {
            few.units[base].prefix + name: value
            for base, mixture in mixtures
            if mixture != {base: 1.0}
            for name, value in mixed(few, base, mixture).items()
        }
        notes = {
            "threshold": threshold,
            "collapses": [{"into": base, "layers": count, "similarity": one} for base, count, one in accepted],
            "mixtures": {
                str(base): {str(old): c for old, c in one.items()} for base, one in mixtures if one != {base: 1.0}
            },
        }
        return Decision(Surgery(drop.depth, tuple(bases)).with_values(replaced), {}, {}, notes)

    def _descend(
        self, trunk: Trunk, drop: Drop, dense: list[States], threshold: float
    ) -> tuple[list[tuple[int, Mixture]], list[tuple[int, int, float]]]:
        """One way down from the top: the layers that are left, and the collapses that were accepted."""
        mixtures: list[tuple[int, Mixture]] = [(index, {index: 1.0}) for index in range(drop.depth)]
        accepted = []
        place = drop.depth - 2
        while place >= 0 and drop.depth - len(mixtures) < drop.count:
            count = min(self.merge, len(mixtures) - 1 - place, drop.count - (drop.depth - len(mixtures)))
            # nothing below `place` has changed, so its old states still hold
            trial = collapse(mixtures, place, count)
            states = dense[place]
            for base, mixture in trial[place:]:
                states = _run(trunk, base, mixture, states)
            similarity = 1 - distance(states, dense[-1])
            if similarity >= threshold:
                accepted.append((mixtures[place][0], count, similarity))
                mixtures = trial
                place = min(place - self.interval, len(mixtures) - 2)
            else:
                place -= 1
        return mixtures, accepted


def collapse(mixtures: list[tuple[int, Mixture]], place: int, count: int) -> list[tuple[int, Mixture]]:
    """The `count` layers after `place` go into it: theta + sum of their differences from theta."""
    base, own = mixtures[place]
    total: Mixture = {old: (1 - count) * weight for old, weight in own.items()}
    for _, other in mixtures[place + 1 : place + 1 + count]:
        for old, weight in other.items():
            total[old] = total.get(old, 0.0) + weight
    merged = {old: weight for old, weight in total.items() if weight}
    return [*mixtures[:place], (base, merged), *mixtures[place + 1 + count :]]


def mixed(trunk: Trunk, base: int, mixture: Mixture) -> dict[str, torch.Tensor]:
    """The parameters of a collapsed layer, float32, by their names in the layer; raises UserError if shapes differ."""
    values: dict[str, torch.Tensor] = {}
    # one layer at a time: the sum is kept, the layers are not
    for old, weight in sorted(mixture.items()):
        with trunk.loaded(old):
            found = {name: one.float() for name, one in trunk.units[old].module.named_parameters()}
            shapes = {name: one.shape for name, one in found.items()}
            if values and shapes != {name: one.shape for name, one in values.items()}:
                raise UserError(f"layers {base} and {old} are of different kinds, so they cannot be collapsed")
            values = {name: weight * one + values.get(name, 0) for name, one in found.items()}
    return values


def _run(trunk: Trunk, base: int, mixture: Mixture, states: States) -> States:
    if mixture == {base: 1.0}:
        with trunk.loaded(base):
            return trunk.run(base, states)
    values, module = mixed(trunk, base, mixture), trunk.units[base].module
    with trunk.loaded(base):
        dtypes = {name: one.dtype for name, one in module.named_parameters()}
        with holding(module, {name: one.to(dtypes[name]) for name, one in values.items()}):
            return trunk.run(base, states)
