"""FlattenGPT: two neighbouring layers become one of the same shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.func import functional_call

from llmprune.arch.roles import Roles, Weight
from llmprune.arch.sublayers import ATTENTION, HALVES, MLP
from llmprune.arch.units import CHANNEL, KV_GROUP, Units, find_units
from llmprune.checkpoint.surgery import Surgery
from llmprune.engine.observe import Observe, Product
from llmprune.engine.search import run_without
from llmprune.engine.similarity import turns
from llmprune.engine.trunk import States, Trunk, holding
from llmprune.methods.structural import TEXT, Decision, Drop
from llmprune.solvers.groups import damped, eliminate, fold, ridge
from llmprune.types import UserError

KINDS = {ATTENTION: KV_GROUP, MLP: CHANNEL}
Values = dict[str, torch.Tensor]


@dataclass(frozen=True)
class FlattenGPT:
    """Put two layers with nearly the same input side by side, then take out half of their heads and channels.

    Xu et al. 2026, "FlattenGPT: Depth Compression for Transformer with Layer Flattening". Pairs: those whose inputs have the
    highest cosine similarity, no layer in two of them. The wide layer adds up both attentions, then both MLPs; norm
    gains go into the matrices behind them. Which kv groups and channels stay is group OBS on what they put out, and the
    writing matrices are solved anew by ridge regression (`damping`: fraction of the mean of the diagonal). Deviation:
    their aim is what the two layers put out one after the other, not side by side.
    """

    damping: float = 0.01

    kind: ClassVar[str] = "depth"
    needs: ClassVar[frozenset[str]] = frozenset({TEXT})
    patterns: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2602.08858"
    takes_list: ClassVar[bool] = True
    memory: ClassVar[str] = "two layers, their activations, and squares of twice the MLP's width in float64"

    def __post_init__(self) -> None:
        if self.damping <= 0:
            raise ValueError(f"damping {self.damping} must be positive")

    def decide(self, trunk: Trunk, drop: Drop) -> Decision:
        roles = Roles(trunk.model)
        hindered = {index: why for index in range(1, trunk.depth) if (why := _unlike(roles, index))}
        scores: dict[int, float] = {}
        if drop.given is None and len(hindered) < trunk.depth - 1:
            alike = turns(trunk, 1).cosine_distance
            scores = {index: alike[index - 1] for index in range(1, trunk.depth) if index not in hindered}
        seconds = disjoint(scores, drop.count) if scores else drop.given or (1,)
        for index in seconds:
            if index == 0 or index - 1 in seconds:
                raise UserError(f"layer {index} would go into the one before it, which must stay")
            if index in hindered:
                raise UserError(f"layers {index - 1} and {index} cannot become one plain layer: {hindered[index]}")
        values: Values = {}
        errors = {}
        states = trunk.enter()
        for index in (one for one in range(trunk.depth) if one not in seconds):
            if index + 1 in seconds:
                with trunk.loaded(index, index + 1):
                    new, states, errors[str(index)] = _Pair(trunk, roles, index, self.damping).flatten(states)
                values.update({trunk.units[index].prefix + name: one for name, one in new.items()})
            else:
                with trunk.loaded(index):
                    states = trunk.run(index, states)
        notes = {"flattened": [[index - 1, index] for index in seconds], "relative_error": errors}
        return Decision(Surgery.drop(drop.depth, seconds).with_values(values), scores, {}, notes)


def disjoint(scores: dict[int, float], count: int) -> tuple[int, ...]:
    """The `count` numbers, no two of them neighbours, with the least sum of scores; raises UserError."""
    # the best choice of k numbers so far, by k; `before`: without the last number looked at
    best: list[tuple[float, tuple[int, ...]] | None] = [(0.0, ()), *[None] * count]
    before = list(best)
    last = None
    for index in sorted(scores):
        free = best if last is not None and index - last > 1 else before
        grown = list(best)
        for k in range(1, count + 1):
            rest = free[k - 1]
            here = grown[k]
            if rest is not None and (here is None or rest[0] + scores[index] < here[0]):
                grown[k] = (rest[0] + scores[index], (*rest[1], index))
        before, best, last = best, grown, index
    chosen = best[count]
    if chosen is None:
        most = max(k for k, one in enumerate(best) if one is not None)
        raise UserError(f"only {most} layers can each become one with the layer before it, not {count}; drop fewer")
    return chosen[1]


class _Pair:
    """Two loaded layers on their way to one; `first` is the number of the one that stays."""

    def __init__(self, trunk: Trunk, roles: Roles, first: int, damping: float) -> None:
        self.trunk, self.first, self.damping = trunk, first, damping
        self.layers = (first, first + 1)
        self.norms = [dict(zip(HALVES, roles.layers[index].norms, strict=True)) for index in self.layers]
        pair = [one for one in find_units(roles, list(KINDS.values())) if one.layer in self.layers]
        self.units = {half: [one for one in pair if one.kind == kind] for half, kind in KINDS.items()}

    def flatten(self, states: States) -> tuple[Values, States, float]:
        """The new layer's parameters by name in the layer, what leaves it, and the error as a share of what is added."""
        trunk, (first, second) = self.trunk, self.layers
        without = {index: {half: {(index, half)} for half in HALVES} for index in self.layers}
        module = trunk.units[first].module
        between = trunk.run(first, states)
        target = trunk.run(second, between)
        # x + A1(x) + A2(what really enters the second layer)
        attended = _added(run_without(trunk, first, states, without[first][MLP]),
                          run_without(trunk, second, between, without[second][MLP]), between)  # fmt: skip
        values = self._half(ATTENTION, states, attended)
        with holding(module, values):
            entering = run_without(trunk, first, states, without[first][MLP])
        values |= self._half(MLP, entering, target)
        with holding(module, values):
            leaving = trunk.run(first, states)
        return values, leaving, _energy(leaving, target) / _energy(states, target)

    def _half(self, half: str, states: States, target: States) -> Values:
        """One half of the new layer, on the states that enter it, towards what is to leave it."""
        units = self.units[half]
        writers = [one.writer for one in units if one.writer is not None]
        weight_OI = torch.cat([self._outputs_first(one) for one in writers], 1).double()
        gram_II, cross_IO = self._sums(half, states, target, writers)
        columns_UN = torch.cat([_columns(units[0]), _columns(units[1]) + writers[0].inputs]).to(gram_II.device)
        system_II = damped(gram_II, self.damping)
        gone = eliminate(weight_OI, system_II, columns_UN, units[0].count).order
        gone_I = torch.zeros(len(gram_II), dtype=torch.bool, device=gram_II.device)
        gone_I[columns_UN[gone]] = True
        new_OI = fold(weight_OI, system_II, gone_I)
        new_OI[:, ~gone_I] += ridge(system_II[~gone_I][:, ~gone_I], cross_IO[~gone_I]).T
        # units of the second layer take the places of those of the first that go
        places = [unit for unit in range(units[0].count) if unit in gone]
        sources = [unit for unit in range(units[1].count) if units[0].count + unit not in gone]
        return self._assembled(half, places, sources, new_OI)

    def _sums(
        self, half: str, states: States, target: States, writers: Sequence[Weight]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """X'X of the inputs X of both writers, and X'E, E what the wide layer's output lacks of the target."""
        trunk, other = self.trunk, next(one for one in HALVES if one != half)
        parameters = {one.name: trunk.model.get_parameter(one.name) for one in writers}
        inner = sum(one.inputs for one in writers)
        gram_II = torch.zeros(inner, inner, dtype=torch.float64, device=states[0].device)
        cross_IO = gram_II.new_zeros(inner, writers[0].outputs)
        for number, state in enumerate(states):
            seen: dict[str, torch.Tensor] = {}

            def see(products: list[Product], seen: dict[str, torch.Tensor] = seen) -> None:
                seen.update({one.name: one.x_TI for one in products})

            here = range(number, number + 1)
            with Observe(parameters, see):
                added = [run_without(trunk, index, [state], {(index, other)}, batches=here) for index in self.layers]
            x_TI = torch.cat([seen[one.name] for one in writers], 1).double()
            wide = _added(added[0], added[1], [state])[0]
            lack_TO = (target[number].double() - wide.double()).flatten(0, 1)
            gram_II += x_TI.T @ x_TI
            cross_IO += x_TI.T @ lack_TO
        return gram_II, cross_IO

    def _assembled(self, half: str, places: list[int], sources: list[int], writer_OI: torch.Tensor) -> Values:
        """The parameters of a half: units `sources` of the second layer in the places of units `places` of the first."""
        mine, other = self.units[half]
        writer = mine.writer
        assert writer is not None
        found: Values = {self._short(self.norms[0][half]): torch.ones_like(self._float(self.norms[0][half]))}
        for one, two in zip(mine.members, other.members, strict=True):
            to = one.index_UN[places].flatten()
            source = two.index_UN[sources].flatten()
            if one.parameter == writer.name:
                value_OI = writer_OI[:, : writer.inputs].clone()
                value_OI[:, to] = writer_OI[:, writer.inputs + source]
                value = value_OI.float() if writer.output_axis == 0 else value_OI.T.float().contiguous()
            else:
                # queries, keys and values may share a parameter
                begun = found.get(self._short(one.parameter))
                value = self._with_gain(0, one.parameter, one.axis, half) if begun is None else begun
                moved = self._with_gain(1, two.parameter, two.axis, half).index_select(
                    one.axis, source.to(value.device)
                )
                value.index_copy_(one.axis, to.to(value.device), moved)
            found[self._short(one.parameter)] = value
        if writer.bias:
            assert other.writer is not None and other.writer.bias is not None
            found[self._short(writer.bias)] = self._float(writer.bias) + self._float(other.writer.bias)
        return found

    def _with_gain(self, which: int, name: str, axis: int, half: str) -> torch.Tensor:
        """A matrix that reads what a norm puts out, with the gain of the norm; a bias as it is."""
        value = self._float(name).clone()
        if value.dim() == 2:
            gain_I = self._float(self.norms[which][half])
            value *= gain_I if axis == 0 else gain_I[:, None]
        return value

    def _float(self, name: str) -> torch.Tensor:
        value: torch.Tensor = self.trunk.model.get_parameter(name).detach().float()
        return value

    def _outputs_first(self, writer: Weight) -> torch.Tensor:
        value: torch.Tensor = self.trunk.model.get_parameter(writer.name).detach()
        return value if writer.output_axis == 0 else value.T

    def _short(self, name: str) -> str:
        return name.removeprefix(self.trunk.units[self.first].prefix)


def _unlike(roles: Roles, index: int) -> str | None:
    """Why layer `index` and the one before cannot be one layer of their class; None if they can."""
    names = []
    for number in (index - 1, index):
        layer = roles.layers[number]
        prefix = f"{roles.path}.{number}."
        if layer.mlp is None or len(layer.norms) != 2:
            return "each must have an attention and a dense MLP with one norm before each"
        units = [one for one in find_units(roles, list(KINDS.values())) if one.layer == number]
        known = {member.parameter for one in units for member in one.members if not member.norm}
        known |= {one.writer.bias for one in units if one.writer is not None and one.writer.bias} | set(layer.norms)
        module = roles.model.get_submodule(prefix[:-1])
        shapes = {name: one.shape for name, one in module.named_parameters()}
        if alone := sorted(name for name in shapes if prefix + name not in known):
            return f"{alone[0]} belongs to all heads of a layer, and those of two layers would need one each"
        if not all(_is_rms_norm(roles.model.get_submodule(norm.rpartition(".")[0])) for norm in layer.norms):
            return "their norms are no RMSNorm whose gain is a factor"
        names.append(shapes)
    kinds = getattr(roles.model.config.get_text_config(), "layer_types", None)
    if names[0] != names[1] or (kinds and kinds[index - 1] != kinds[index]):
        return "they are of different kinds"
    return None


def _is_rms_norm(norm: nn.Module) -> bool:
    """Whether a norm divides by the root mean square and multiplies by its weight."""
    weight_I = torch.linspace(0.5, 2, norm.get_parameter("weight").numel())
    x_I = torch.linspace(-1, 3, weight_I.numel())
    found = functional_call(norm, {"weight": weight_I}, (x_I,))
    return torch.allclose(found, x_I * x_I.square().mean().rsqrt() * weight_I, rtol=1e-3)


def _columns(units: Units) -> torch.Tensor:
    assert units.columns_UN is not None
    return units.columns_UN


def _added(first: States, second: States, base: States) -> States:
    """first + second - base, batch by batch."""
    return [a + b - c for a, b, c in zip(first, second, base, strict=True)]


def _energy(first: States, second: States) -> float:
    """The squared distance of two lists of states."""
    return sum(float((a.double() - b.double()).square().sum()) for a, b in zip(first, second, strict=True))
