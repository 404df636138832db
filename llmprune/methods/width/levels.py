"""The level database: every writing matrix solved at several widths, and how far a choice of them leads off."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from llmprune.allocation.evolution import Counts
from llmprune.checkpoint.slicing import Place
from llmprune.engine.trunk import States, Trunk, holding
from llmprune.engine.widths import Evidence, evidences
from llmprune.methods.structural import Narrow, Narrowed
from llmprune.methods.width.choice import Way, choose
from llmprune.methods.width.sequential import Layer, amounts, by_layer, halves
from llmprune.solvers.groups import damped, fold

# The share of the calibration sequences that each stage of the search looks at.
SHARES = (1 / 16, 1 / 4, 1.0)


def searched(trunk: Trunk, asked: Narrow, way: Way) -> tuple[Counts, dict[str, Any]]:
    """How many units of every place go, by `asked.search`, and what the report says of the search."""
    assert asked.search is not None
    counts = amounts(trunk, asked, way)
    start = asked.search.start({place: counts[place] for place in asked.search.demand.units})
    levels = Levels(trunk, asked, way, {**counts, **start}, asked.search.levels(start))
    best, history = asked.search.search(start, Divergence(trunk, levels))
    return {**counts, **best}, {"kl": history}


class Levels:
    """The writing matrix of each place at each of its `levels`, numbers of units that go, in a temporary folder.

    One elimination gives all levels of a place, as its order is that of every smaller number. Layers see what those
    before them put out at `start`. The idea is ZipLM's (Kurtic et al. 2023, section 3.2); the error that
    accumulates over the layers is in what later ones see, as in Týr-the-Pruner.
    """

    def __init__(
        self, trunk: Trunk, asked: Narrow, way: Way, start: Mapping[Place, int], levels: Mapping[Place, Sequence[int]]
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="llmprune-levels-")
        self._units, self._way = asked.units, way
        states = trunk.enter()
        for index, places in by_layer(trunk, asked):
            with trunk.loaded(index):
                layer = Layer(trunk, index, asked, way, states, None)
                with holding(trunk.units[index].module, layer.starting_values(places)) as held:
                    for half in halves(places):
                        stats = layer.measured(half)
                        values = {layer.prefix + name: one.data for name, one in held.items()}
                        for place in half:
                            if place in levels:
                                self._solve(place, list(evidences(asked.units[place], stats, values)), levels[place])
                        layer.narrow(half, stats, start, held, Narrowed({place: [] for place in half}))
                    states = trunk.run(index, states)

    def values(self, index: int, prefix: str, counts: Mapping[Place, int]) -> dict[str, torch.Tensor]:
        """The writing matrices of a layer, by their names in it, if so many units go."""
        found = {}
        for place, count in counts.items():
            writer = self._units[place].writer
            if place[0] == index and writer is not None:
                with safe_open(self._path(place), framework="pt") as file:
                    found[writer.name.removeprefix(prefix)] = file.get_tensor(str(count))
        return found

    def _solve(self, place: Place, parts: Sequence[Evidence], levels: Sequence[int]) -> None:
        units = self._units[place]
        writer = units.writer
        assert writer is not None
        stored = parts[0].values[writer.name]
        found = {count: stored.cpu().clone() for count in levels}
        for number, evidence in enumerate(parts):
            order, _ = choose(evidence, max(levels) // len(parts), self._way)
            for count, matrix in found.items():
                new_OI = self._without(evidence, leading(order, count // len(parts), evidence.strata, evidence.count))
                if units.stacked:
                    matrix[number].copy_(new_OI)
                else:
                    matrix.copy_(new_OI if writer.output_axis == 0 else new_OI.T)
        save_file({str(count): one.contiguous() for count, one in found.items()}, self._path(place))

    def _without(self, evidence: Evidence, gone: list[int]) -> torch.Tensor:
        gone_I = torch.zeros(evidence.writer_OI.shape[1], dtype=torch.bool, device=evidence.writer_OI.device)
        gone_I[evidence.columns_UN[gone]] = True
        if evidence.stats is None or not gone:
            return evidence.writer_OI.masked_fill(gone_I, 0)
        return fold(evidence.writer_OI, damped(evidence.stats.gram_II, self._way.damping), gone_I)

    def _path(self, place: Place) -> Path:
        return Path(self._folder.name) / f"{place[0]}.{place[1]}.safetensors"


class Divergence:
    """How far models made of levels are from the dense one: the mean of KL(dense || model) over all tokens, in nats."""

    def __init__(self, trunk: Trunk, levels: Levels) -> None:
        sequences = sum(len(batch["input_ids"]) for batch in trunk.batches)
        self._stages = [trunk.first(math.ceil(share * sequences)) for share in SHARES]
        self._levels = levels
        self._dense = [_last(one) for one in self._stages]

    def __call__(self, candidates: Sequence[Counts], stage: int) -> list[float]:
        """All candidates go through the layers together; what two have in common up to a layer is run once."""
        trunk = self._stages[stage]
        paths: dict[tuple[int, ...], States] = {(): trunk.enter()}
        keys: list[tuple[int, ...]] = [() for _ in candidates]
        for index in range(trunk.depth):
            unit, after = trunk.units[index], dict[tuple[int, ...], States]()
            with trunk.loaded(index):
                for number, counts in enumerate(candidates):
                    before = keys[number]
                    keys[number] = (*before, *(count for place, count in counts.items() if place[0] == index))
                    if keys[number] not in after:
                        with holding(unit.module, self._levels.values(index, unit.prefix, counts)):
                            after[keys[number]] = trunk.run(index, paths[before])
            paths = after
        found = dict.fromkeys(keys, 0.0)
        for batch, dense in enumerate(self._dense[stage]):
            wanted_BTV = F.log_softmax(trunk.logits(batch, dense).float(), -1)
            for key in found:
                logits_BTV = F.log_softmax(trunk.logits(batch, paths[key][batch]).float(), -1)
                found[key] += float(F.kl_div(logits_BTV, wanted_BTV, reduction="sum", log_target=True))
        tokens = sum(batch["input_ids"].numel() for batch in trunk.batches)
        return [found[key] / tokens for key in keys]


def leading(order: Sequence[int], count: int, strata: int, units: int) -> list[int]:
    """The first `count` of `units` in an order, as many of each of `strata` runs."""
    taken = [0] * strata
    found = []
    for unit in order:
        run = unit // (units // strata)
        if taken[run] < count // strata:
            taken[run] += 1
            found.append(unit)
    return found


def _last(trunk: Trunk) -> States:
    """What leaves the last layer of the dense model."""
    states = trunk.enter()
    for _, after in trunk.walk(states):
        states = after
    return states
