"""The way through the layers that the width methods share: measure a half, choose its units, make up for them, go on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from llmprune.allocation.widths import LAYER
from llmprune.arch.roles import Weight
from llmprune.arch.units import KEY, KV_GROUP, QUERY_HEAD, RESIDUAL, VALUE, heads_of
from llmprune.checkpoint.slicing import HIDDEN, Place, Slicing
from llmprune.engine.dense import Inputs
from llmprune.engine.similarity import turns
from llmprune.engine.trunk import States, Trunk, holding
from llmprune.engine.widths import Evidence, evidences, measure, record
from llmprune.methods.structural import TEXT, Narrow, Narrowed
from llmprune.methods.width.choice import Score, Way, choose, lowest
from llmprune.solvers.groups import damped, fold, mean_fold
from llmprune.solvers.retarget import retarget
from llmprune.statistics import DRIFT, Stats
from llmprune.types import UserError

HEADS = (KV_GROUP, QUERY_HEAD)
COMPENSATIONS = ("none", "bias", "least-squares")


class UnitMethod:
    """What all width methods have in common."""

    kind: ClassVar[str] = "width"
    needs: ClassVar[frozenset[str]] = frozenset({TEXT})
    patterns: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[str] = "plain"
    takes_list: ClassVar[bool] = False
    searches: ClassVar[bool] = False  # whether it can be asked to search for the amounts
    whole: ClassVar[tuple[str, ...]] = ()  # the units that go with layout=remote-code, where the user names none
    compares: ClassVar[bool] = False  # whether it has scores for key dimensions

    def way(self) -> Way:
        """How the method goes."""
        raise NotImplementedError

    def check(self, model: PreTrainedModel, asked: Narrow) -> None:
        """Whether the method can handle a model; raises UserError. Reads no weights."""
        way = self.way()
        if asked.search is not None and not self.searches:
            raise UserError(
                "allocation=evolutionary chooses among levels of group-obs (ziplm, slimgpt, osscar); use that method"
            )
        if asked.search is not None and (way.aim or not way.pruned):
            raise UserError(
                "allocation=evolutionary compares layers on the pruned stream: leave out aim and stream=dense (ziplm)"
            )
        if any(kind == KEY for _, kind in asked.units):
            if not self.compares:
                raise UserError(f"this method has no scores for {KEY}s; modegpt, group-magnitude and random-units have")
            if way.unique:
                raise UserError(f"uniqueness compares what units put out, and {KEY}s put out nothing by themselves")
        if HIDDEN in asked.units and way.hidden is None:
            raise UserError(
                f"this method has no scores for dimensions of the hidden state ({RESIDUAL}); llm-pruner, minitron, "
                "group-magnitude and random-units have"
            )
        if HIDDEN in asked.units and (way.compensate != "none" or way.unique):
            raise UserError(
                f"where {RESIDUAL} dimensions go nothing makes up for them: leave compensate and uniqueness out"
            )
        if way.compensate == "bias":
            writers = _writers(asked, list(asked.units))
            asked.check_biases([bias_name(one.name) for one in writers if one.bias is None])

    def decide(self, trunk: Trunk, asked: Narrow) -> Narrowed:
        return narrow(trunk, asked, self.way())


@dataclass(frozen=True)
class ScoredUnits(UnitMethod):
    """A method that scores every unit by itself; those with the lowest scores go.

    `compensate`: what the matrix that units write through does for those that go: "none", "bias" (adds their mean) or
    "least-squares" (its other columns, by ridge regression with `damping`). `uniqueness`: "gum" multiplies every score by
    how unlike the other units of its layer a unit is (`unlike`).
    """

    compensate: str = "none"
    damping: float = 0.01
    uniqueness: str = "none"

    kinds: ClassVar[frozenset[str]] = frozenset()  # the statistics that the score reads
    scores_hidden: ClassVar[bool] = False  # whether `hidden` answers
    pruned: ClassVar[bool] = True  # of the pruned stream, or of the dense one

    def __post_init__(self) -> None:
        for key, known in (("compensate", COMPENSATIONS), ("uniqueness", ("none", "gum"))):
            if getattr(self, key) not in known:
                raise ValueError(f"{key} {getattr(self, key)!r} is none of {', '.join(known)}")

    def score(self, evidence: Evidence) -> torch.Tensor:
        """The scores of the units, U."""
        raise NotImplementedError

    def hidden(self, trunk: Trunk, asked: Narrow) -> torch.Tensor:
        """The scores of the dimensions of the hidden state, D."""
        raise NotImplementedError

    def way(self) -> Way:
        hidden = self.hidden if self.scores_hidden else None
        return Way(
            self.score,
            self.compensate,
            self.pruned,
            self.damping,
            kinds=self.kinds,
            unique=self.uniqueness == "gum",
            hidden=hidden,
        )


@dataclass(frozen=True)
class ModelScores(ScoredUnits):
    """A method that scores the units of all layers in one go, from the model as a whole."""

    def scores(self, trunk: Trunk, asked: Narrow) -> dict[Place, torch.Tensor]:
        """The score of every unit, by place."""
        raise NotImplementedError

    def decide(self, trunk: Trunk, asked: Narrow) -> Narrowed:
        scores = self.scores(trunk, asked)
        return narrow(trunk, asked, replace(self.way(), score=given(scores), hidden=lambda *_: scores[HIDDEN]))


def narrow(trunk: Trunk, asked: Narrow, way: Way) -> Narrowed:
    """Take units out of layer after layer. Holds one layer, the activations, and every matrix that gets new values."""
    counts = amounts(trunk, asked, way)
    found = Narrowed({place: [] for place in asked.units})
    if HIDDEN in asked.units:
        assert way.hidden is not None
        found.scores[HIDDEN] = way.hidden(trunk, asked)
        found.removed[HIDDEN] = lowest(found.scores[HIDDEN], counts[HIDDEN])
    states = trunk.enter() if way.reads else []
    dense: States = list(states) if way.aim else []
    for index, places in by_layer(trunk, asked):
        with trunk.loaded(index):
            inputs: list[Inputs] | None = None
            if dense:
                plain = [one for one in places if not asked.units[one].stacked]
                inputs, dense = record(trunk, index, dense, _names(asked, plain))
            layer = Layer(trunk, index, asked, way, states, inputs)
            after: States | None = None
            if states and not way.pruned:
                layer.stats, after = layer.measured(places), trunk.run(index, states)
            with holding(trunk.units[index].module, layer.starting_values(places)) as held:
                for half in halves(places):
                    stats = layer.stats if layer.stats is not None else layer.measured(half)
                    if layer.turned(half, stats, counts, held, found):
                        stats = layer.measured(half)
                    layer.narrow(half, stats, counts, held, found)
                if states:
                    states = trunk.run(index, states) if after is None else after
    return found


def amounts(trunk: Trunk, asked: Narrow, way: Way) -> dict[Place, int]:
    """How many units of each place go."""
    if not asked.scored:
        return asked.spread({})
    if not asked.influence:
        return asked.spread(scores_of(trunk, asked, way))
    turned = enumerate(turns(trunk, 1).cosine_distance)
    return asked.spread({(index, LAYER): torch.tensor(one) for index, one in turned})


def scores_of(trunk: Trunk, asked: Narrow, way: Way) -> dict[Place, torch.Tensor]:
    """The score of every unit in the dense model, in one pass."""
    scores: dict[Place, torch.Tensor] = {}
    kinds = way.reads - {DRIFT}
    states = trunk.enter() if kinds else []
    for index, places in by_layer(trunk, asked):
        unit = trunk.units[index]
        with trunk.loaded(index):
            values = {unit.prefix + name: one for name, one in unit.module.named_parameters()}
            stats = measure(trunk, index, states, _names(asked, places), kinds) if kinds and places else {}
            for place in places:
                some = evidences(asked.units[place], stats, values)
                scores[place] = torch.cat([choose(one, one.count - one.strata, way)[1].cpu() for one in some])
            states = trunk.run(index, states) if states else []
    return scores


@dataclass
class Layer:
    """One layer on its way to fewer units."""

    trunk: Trunk
    index: int
    asked: Narrow
    way: Way
    states: States
    inputs: list[Inputs] | None
    stats: dict[str, Stats] | None = None

    @property
    def prefix(self) -> str:
        return self.trunk.units[self.index].prefix

    def measured(self, places: list[Place]) -> dict[str, Stats]:
        """Statistics of what the units of some places put out, as the layer is now."""
        kinds, writers = self.way.reads, _names(self.asked, places)
        # which tokens an expert sees differs from the dense model
        beside = None if any(self.asked.units[place].stacked for place in places) else self.inputs
        kinds = kinds if beside is not None else kinds - {DRIFT}
        return measure(self.trunk, self.index, self.states, writers, kinds, beside) if kinds and writers else {}

    def starting_values(self, places: list[Place]) -> dict[str, torch.Tensor]:
        """Every parameter that may change, by its name in the layer; biases that are new are zeros."""
        module = self.trunk.units[self.index].module
        units = [self.asked.units[place] for place in places]
        names = {member.parameter.removeprefix(self.prefix) for one in units for member in one.members}
        values = {name: module.get_parameter(name).data for name in names}
        if self.way.compensate == "bias":
            for writer in _writers(self.asked, places):
                name = bias_name(writer.name).removeprefix(self.prefix)
                old = module.get_parameter(name).data if writer.bias else None
                values[name] = (
                    values[f"{name.removesuffix('bias')}weight"].new_zeros(writer.outputs) if old is None else old
                )
        return values

    def turned(
        self,
        half: list[Place],
        stats: Mapping[str, Stats],
        counts: Mapping[Place, int],
        held: Mapping[str, torch.Tensor],
        found: Narrowed,
    ) -> bool:
        """Bring the value dimensions that are `held` into a new basis, if the way has one; returns whether it did."""
        place = (self.index, VALUE)
        if self.way.basis is None or place not in half or not counts[place]:
            return False
        attention = self.asked.roles.layers[self.index].attention
        value, index_GH = heads_of(attention)[2]
        values = {self.prefix + name: one.data for name, one in held.items()}
        (evidence,) = evidences(self.asked.units[place], stats, values)
        basis_GHK = self.way.basis(evidence)
        back_GKH = torch.linalg.inv(basis_GHK)
        for name, axis in ((value.name, value.output_axis), (value.bias, 0)):
            if name is not None:
                rows = values[name].movedim(axis, 0)
                rows_GHD = rows[index_GH].double().flatten(2) if rows.dim() > 1 else rows[index_GH].double()[..., None]
                rows[index_GH] = (basis_GHK.mT @ rows_GHD).view(rows[index_GH].shape).to(rows.dtype)
                found.values[name] = values[name].cpu().clone()
        columns = values[attention.output.name].movedim(attention.output.input_axis, 0)
        columns_GRHO = columns.double().reshape(len(basis_GHK), -1, basis_GHK.shape[1], columns.shape[-1])
        columns.copy_((back_GKH[:, None] @ columns_GRHO).view(columns.shape))
        return True

    def narrow(
        self,
        half: list[Place],
        stats: Mapping[str, Stats],
        counts: Mapping[Place, int],
        held: Mapping[str, torch.Tensor],
        found: Narrowed,
    ) -> None:
        """Choose the units of `half` that go, by `stats`, and change the values that are `held` in the layer."""
        values = {self.prefix + name: one.data for name, one in held.items()}
        for place in half:
            units, scores = self.asked.units[place], []
            each = counts[place] // (units.strata if units.stacked else 1)
            for evidence in evidences(units, stats, values):
                gone, score_U = choose(evidence, each, self.way)
                found.removed[place] += [evidence.first + unit for unit in gone]
                scores.append(score_U.cpu())
                self._make_up(evidence, gone, values, found)
            found.scores[place] = torch.cat(scores)
            shapes = {member.parameter: values[member.parameter].shape for member in units.members}
            slicing = Slicing([units], shapes, {place: found.removed[place]}, ragged=True)
            for name in shapes:
                values[name].copy_(slicing.zeroed(name, values[name]))
            if self.way.compensate == "least-squares" and units.writer is not None:
                found.values[units.writer.name] = values[units.writer.name].cpu().clone()

    def _make_up(
        self, evidence: Evidence, gone: list[int], values: Mapping[str, torch.Tensor], found: Narrowed
    ) -> None:
        """New values for the writing matrix, or its bias, in place."""
        stats, writer, way = evidence.stats, evidence.units.writer, self.way
        if writer is None:
            return
        gone_I = torch.zeros(evidence.writer_OI.shape[1], dtype=torch.bool, device=evidence.writer_OI.device)
        gone_I[evidence.columns_UN[gone]] = True
        if stats is None or way.compensate == "none" or not (gone or way.aim):
            return
        if way.compensate == "bias":
            name = bias_name(writer.name)
            values[name].add_(mean_fold(evidence.writer_OI, stats.mean_I, gone_I))
            (found.values if writer.bias else found.biases)[name] = values[name].cpu().clone()
            return
        weight_OI = evidence.writer_OI
        if way.aim and not evidence.units.stacked and stats.paired:
            weight_OI = retarget(weight_OI, stats.pull_OI(weight_OI), stats.scaled(way.damping), way.aim)
        new_OI = fold(weight_OI, damped(stats.gram_II, way.damping), gone_I)
        stored = values[writer.name]
        if evidence.units.stacked:
            stored[evidence.first // evidence.units.size].copy_(new_OI)
        else:
            stored.copy_(new_OI if writer.output_axis == 0 else new_OI.T)


def given(scores: Mapping[Place, torch.Tensor]) -> Score:
    """Scores that are known beforehand."""

    def score(evidence: Evidence) -> torch.Tensor:
        units = evidence.units
        return scores[(units.layer, units.kind)][evidence.first : evidence.first + evidence.count]

    return score


def bias_name(weight: str) -> str:
    """The name of the bias that belongs to a matrix."""
    return f"{weight.removesuffix('weight')}bias"


def by_layer(trunk: Trunk, asked: Narrow) -> Iterator[tuple[int, list[Place]]]:
    for index in range(trunk.depth):
        yield index, [place for place in asked.units if place[0] == index]


def halves(places: list[Place]) -> Iterator[list[Place]]:
    """Places that write through the same matrix, in the order of the forward pass; first those that write through none."""
    keys = [place for place in places if place[1] == KEY]
    heads = [place for place in places if place[1] in (*HEADS, VALUE)]
    for half in (keys, heads, [place for place in places if place not in (*keys, *heads)]):
        if half:
            yield half


def _names(asked: Narrow, places: list[Place]) -> list[str]:
    units = [asked.units[place] for place in places]
    return [one.name for unit in units if (one := unit.writer or unit.reader) is not None]


def _writers(asked: Narrow, places: list[Place]) -> list[Weight]:
    return [one for place in places if (one := asked.units[place].writer) is not None]
