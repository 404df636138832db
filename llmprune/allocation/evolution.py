"""Evolutionary search for how many units go in every layer, the number of parameters staying the same."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from llmprune.allocation.widths import HEADS, Demand
from llmprune.checkpoint.slicing import Place

Counts: TypeAlias = dict[Place, int]
# How bad each of some candidates is, on the text of a stage: the first stage has least, the last one all.
Measure: TypeAlias = Callable[[Sequence[Counts], int], list[float]]

# Steps into which the channels of a layer are divided at most.
LEVELS = 16
# No layer loses more than this many times what it loses at the start, and two steps.
REACH = 2
# Of the offspring that enter each stage but the first, one in so many.
SURVIVORS = (4, 4)
# A child differs from its parent by at most so many moves.
MOVES = 3


@dataclass(frozen=True)
class Evolution:
    """Offspring move a step of what goes from one layer to another; the best of each generation is the next parent.

    Li et al. 2025, "Týr-the-Pruner: Structural Pruning LLMs via Global Sparsity Distribution Optimization", section 3.2
    (there in four rounds of ever finer steps, here in one), after Tang et al. 2025, "DarwinLM". A step is between
    layers whose units cost the same, so every candidate has exactly the parameters of the first.
    """

    demand: Demand
    generations: int
    offspring: int
    seed: int

    def start(self, counts: Mapping[Place, int]) -> Counts:
        """`counts` less what goes beyond the demand: channels that stay after all, in the first layers that lose some."""
        units = self.demand.units
        found = dict(counts)
        surplus = sum(one.cost * counts[place] for place, one in units.items()) - self.demand.parameters
        for place, one in units.items():
            back = self.demand.step_of(place) * one.strata
            if place[1] not in HEADS and found[place] >= back and one.cost * back <= surplus:
                found[place] -= back
                surplus -= one.cost * back
        return found

    def step(self, place: Place) -> int:
        """How many units of a place come or go at once."""
        one = self.demand.units[place]
        fine = self.demand.step_of(place)
        coarse = 1 if place[1] in HEADS else max(one.size // (LEVELS * fine), 1)
        return fine * coarse * one.strata

    def levels(self, start: Mapping[Place, int]) -> dict[Place, list[int]]:
        """The numbers of units of every place that may go."""
        found = {}
        for place, one in self.demand.units.items():
            step, first = self.step(place), start[place]
            most = min(REACH * first + 2 * step, one.count - self.demand.step_of(place) * one.strata)
            found[place] = list(range(first % step, most + 1, step)) if first <= most else [first]
        return found

    def search(self, start: Counts, measure: Measure) -> tuple[Counts, list[float]]:
        """The best that was found, and how bad the best of every generation is; the first of these is `start`."""
        draw, levels = random.Random(self.seed), self.levels(start)
        last = len(SURVIVORS)
        parent, badness = start, measure([start], last)[0]
        history = [badness]
        for _ in range(self.generations):
            children = self._children(parent, levels, draw)
            for stage, share in enumerate(SURVIVORS):
                if len(children) > 1:
                    ranked = sorted(zip(measure(children, stage), range(len(children)), strict=True))
                    children = [children[number] for _, number in ranked[: -(-len(children) // share)]]
            for child, found in zip(children, measure(children, last), strict=True):
                if found < badness:
                    parent, badness = child, found
            history.append(badness)
        return parent, history

    def _children(self, parent: Counts, levels: Mapping[Place, list[int]], draw: random.Random) -> list[Counts]:
        """Candidates that differ from the parent and from each other; fewer than asked where there are no more."""
        alike: dict[tuple[str, int, int], list[Place]] = {}
        for place, one in self.demand.units.items():
            alike.setdefault((place[1], one.cost, self.step(place)), []).append(place)
        groups = [places for places in alike.values() if len(places) > 1]
        found: dict[tuple[int, ...], Counts] = {}
        # many draws lead nowhere: to the parent, to a sibling, or beyond the levels
        for _ in range(20 * self.offspring if groups else 0):
            child = dict(parent)
            for _ in range(draw.randint(1, MOVES)):
                gains, loses = draw.sample(draw.choice(groups), 2)
                step = self.step(gains)
                if child[gains] + step in levels[gains] and child[loses] - step in levels[loses]:
                    child[gains] += step
                    child[loses] -= step
            if child != parent:
                found[tuple(child.values())] = child
            if len(found) == self.offspring:
                break
        return list(found.values())
