"""The way through the layers that the width methods share: measure a half, choose its units, make up for them, go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, TypeAlias

import torch
from transformers import PreTrainedModel

from llmprune.arch.roles import Weight
from llmprune.arch.units import KV_GROUP, QUERY_HEAD, RESIDUAL, VALUE
from llmprune.checkpoint.slicing import HIDDEN, Place, Slicing
from llmprune.engine.dense import Inputs
from llmprune.engine.trunk import States, Trunk, holding
from llmprune.engine.widths import Evidence, evidences, measure, record
from llmprune.methods.structural import TEXT, Narrow, Narrowed
from llmprune.solvers.groups import damped, eliminate, fold, mean_fold, unlike
from llmprune.solvers.retarget import retarget
from llmprune.statistics import DRIFT, GRAM, MOMENTS, Stats
from llmprune.types import UserError

# The scores of the units of some evidence: those with the lowest go.
Score: TypeAlias = Callable[[Evidence], torch.Tensor]
# The writing matrix of some evidence, its outputs turned and scaled so that their squared errors count alike.
Weigh: TypeAlias = Callable[[Evidence], torch.Tensor]
HEADS = (KV_GROUP, QUERY_HEAD)
COMPENSATIONS = ("none", "bias", "least-squares")


@dataclass(frozen=True)
class Way:
    """How units are chosen and made up for.

    `score`: of the units; None: OBS chooses them one after another. `compensate`: what the writing matrix does for what
    it loses: nothing, a bias, or the least squares fit of the columns that stay. `pruned`: whether a layer sees what
    the pruned layers before it put out, or what the dense ones did. `aim`, 0 to 1: how far the matrix aims at what it
    puts out in the dense model. `kinds`: statistics that `score` reads. `unique`: scores are multiplied by `unlike`.
    `weigh`: for OBS, where errors of some outputs count more than those of others. `hidden`: the scores of dimensions of the
    hidden state in the dense model, of a method that has such. `basis`: a new basis for the value dimensions of each kv
    head, in which they are chosen.
    """

    score: Score | None
    compensate: str = "none"
    pruned: bool = True
    damping: float = 0.01
    aim: float = 0.0
    kinds: frozenset[str] = frozenset()
    unique: bool = False
    weigh: Weigh | None = None
    hidden: Callable[[Trunk, Narrow], torch.Tensor] | None = None
    basis: Callable[[Evidence], torch.Tensor] | None = None

    @property
    def reads(self) -> frozenset[str]:
        """The statistics that are needed."""
        gram = self.score is None or self.compensate == "least-squares" or self.unique
        extra = {GRAM: gram, DRIFT: self.aim > 0, MOMENTS: self.compensate == "bias"}
        return self.kinds | {kind for kind, wanted in extra.items() if wanted}


class UnitMethod:
    """What all width methods have in common."""

    kind: ClassVar[str] = "width"
    needs: ClassVar[frozenset[str]] = frozenset({TEXT})
    patterns: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[str] = "plain"
    takes_list: ClassVar[bool] = False
    searches: ClassVar[bool] = False  # whether it can be asked to search for the amounts

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
    counts = asked.spread(scores_of(trunk, asked, way) if asked.scored else {})
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
        assert attention.value is not None
        values = {self.prefix + name: one.data for name, one in held.items()}
        (evidence,) = evidences(self.asked.units[place], stats, values)
        basis_GHK = self.way.basis(evidence)
        back_GKH = torch.linalg.inv(basis_GHK)
        for name, axis in ((attention.value.name, attention.value.output_axis), (attention.value.bias, 0)):
            if name is not None:
                rows_GHD = values[name].movedim(axis, 0).double().reshape(*basis_GHK.shape[:2], -1)
                turned = (basis_GHK.mT @ rows_GHD).reshape(values[name].movedim(axis, 0).shape).movedim(0, axis)
                values[name].copy_(turned)
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
            if self.way.compensate == "least-squares":
                assert units.writer is not None
                found.values[units.writer.name] = values[units.writer.name].cpu().clone()

    def _make_up(
        self, evidence: Evidence, gone: list[int], values: Mapping[str, torch.Tensor], found: Narrowed
    ) -> None:
        """New values for the writing matrix, or its bias, in place."""
        stats, writer, way = evidence.stats, evidence.units.writer, self.way
        assert writer is not None
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


def lowest(score_U: torch.Tensor, count: int, strata: int = 1) -> list[int]:
    """The units with the lowest scores, as many from each of `strata` runs, ties to the lowest number."""
    runs_SU = score_U.double().view(strata, -1)
    order_SU = runs_SU.argsort(dim=1, stable=True)[:, : count // strata]
    return (order_SU + torch.arange(strata, device=order_SU.device)[:, None] * runs_SU.shape[1]).flatten().tolist()


def given(scores: Mapping[Place, torch.Tensor]) -> Score:
    """Scores that are known beforehand."""

    def score(evidence: Evidence) -> torch.Tensor:
        units = evidence.units
        return scores[(units.layer, units.kind)][evidence.first : evidence.first + evidence.count]

    return score


def bias_name(weight: str) -> str:
    """The name of the bias that belongs to a matrix."""
    return f"{weight.removesuffix('weight')}bias"


def choose(evidence: Evidence, count: int, way: Way) -> tuple[list[int], torch.Tensor]:
    """The units that go, and the scores of all."""
    if evidence.stats is None and way.reads:
        # no token came by: what is left to go by is the size of the weights
        score_U = torch.stack([rows.square().sum((1, 2)) for rows in evidence.weights()]).sum(0)
        return lowest(score_U, count, evidence.strata), score_U
    if way.score is not None:
        score_U = way.score(evidence)
        if way.unique:
            assert evidence.stats is not None
            score_U = score_U * unlike(evidence.stats.gram_II, evidence.columns_UN).to(score_U)
        return lowest(score_U, count, evidence.strata), score_U
    assert evidence.stats is not None
    system_II = damped(evidence.stats.gram_II, way.damping)
    writer_OI = evidence.writer_OI if way.weigh is None else way.weigh(evidence)
    trace = eliminate(writer_OI, system_II, evidence.columns_UN, count, evidence.strata)
    score_U = torch.full((evidence.count,), float("inf"), dtype=torch.float64)
    score_U[trace.order] = torch.tensor(trace.losses, dtype=torch.float64).cummax(0).values
    return trace.order, score_U.nan_to_num(posinf=max(trace.losses, default=0.0))


def by_layer(trunk: Trunk, asked: Narrow) -> Iterator[tuple[int, list[Place]]]:
    for index in range(trunk.depth):
        yield index, [place for place in asked.units if place[0] == index]


def halves(places: list[Place]) -> Iterator[list[Place]]:
    """Places that write through the same matrix, in the order of the forward pass."""
    heads = [place for place in places if place[1] in (*HEADS, VALUE)]
    for half in (heads, [place for place in places if place not in heads]):
        if half:
            yield half


def _names(asked: Narrow, places: list[Place]) -> list[str]:
    return [one.name for one in _writers(asked, places)]


def _writers(asked: Narrow, places: list[Place]) -> list[Weight]:
    return [one for place in places if (one := asked.units[place].writer) is not None]
