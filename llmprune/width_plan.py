"""What a width recipe will do to a model, from its configuration alone: how much goes, and what class holds the rest."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from llmprune.allocation.evolution import Evolution
from llmprune.allocation.widths import HEADS, Demand, Entry, spread_of
from llmprune.arch.roles import Roles
from llmprune.arch.units import (
    CHANNEL,
    EXPERT_CHANNEL,
    KEY,
    KV_GROUP,
    QUERY_HEAD,
    RESIDUAL,
    VALUE,
    WITHIN_HEADS,
    Units,
    find_units,
)
from llmprune.checkpoint.narrow import Room, check_shapes, holds, layer_entries, narrow_config, with_biases
from llmprune.checkpoint.remote import add_entries
from llmprune.checkpoint.skeleton import build_skeleton, rebuild_layers
from llmprune.checkpoint.slicing import HIDDEN, Place, Slicing
from llmprune.methods import allocation_of
from llmprune.methods.structural import Narrow
from llmprune.recipe import Recipe, nearest
from llmprune.types import UserError

KINDS = (KV_GROUP, QUERY_HEAD, KEY, VALUE, CHANNEL, EXPERT_CHANNEL, RESIDUAL)
USUAL = (KV_GROUP, CHANNEL, EXPERT_CHANNEL)
# rows of fused experts start at multiples of 16 bytes, in formats of 2 bytes
EXPERT_STEP = 8


@dataclass(frozen=True)
class WidthPlan:
    """The units of a model, which of them a plain class can hold fewer of, and what is asked."""

    model: PreTrainedModel
    config: Any
    roles: Roles
    room: Room
    asked: Narrow
    shapes: dict[str, torch.Size]
    ragged: bool = False

    def sliced(self, removed: Mapping[Place, list[int]]) -> Slicing:
        """The edit that takes these units out; kinds that the class cannot hold fewer of stay as zeros."""
        units = self.asked.units.values()
        return Slicing(units, self.shapes, removed, held=self.room.fixed, ragged=self.ragged)

    def example(self) -> Slicing:
        """An edit of the size that is known before scores are: as many units gone as will be, or none."""
        counts = {} if self.asked.scored else self.asked.spread({})
        return self.sliced({place: self.asked.units[place].first(count) for place, count in counts.items()})

    def config_of(self, slicing: Slicing, biases: Sequence[str] = ()) -> Any:
        """The new configuration; raises UserError where no class has one."""
        config = copy.deepcopy(self.config) if self.ragged else narrow_config(self.model, self.config, slicing)
        return with_biases(config, biases, self.config) if biases else config

    def differ(self, slicing: Slicing, new: PreTrainedModel, *configs: Any) -> None:
        """Where every layer may have a width of its own: change those of an empty model, and tell configurations."""
        if self.ragged:
            entries = layer_entries(self.config, slicing, self.roles)
            rebuild_layers(new, self.roles.path, entries)
            for one in configs:
                add_entries(one, self.roles.path, entries)

    def narrowed(self, slicing: Slicing) -> PreTrainedModel:
        """The model without the units that `slicing` takes out, as a new one; its weights must be in memory."""
        new = build_skeleton(self.config_of(slicing), self.model.dtype)
        check_shapes(new, slicing)
        state = {name: slicing.cut(name, one.data) for name, one in self.model.named_parameters()}
        new.load_state_dict(state, strict=False, assign=True)
        new.tie_weights()
        found: PreTrainedModel = new.to(self.model.device)
        return found


def plan_width(model: PreTrainedModel, config: Any, recipe: Recipe, usual: Sequence[str] = ()) -> WidthPlan:
    """Check a width recipe against a model, whose weights are not read; `config`: as it was stored. Raises UserError.

    `usual`: the units that go where the recipe names none, instead of `USUAL`.
    """
    check_width(recipe)
    settings, spread = recipe.width, spread_of(allocation_of(recipe))
    usual = usual or USUAL
    roles = Roles(model)
    depth = len(roles.layers)
    if settings.protect_first + settings.protect_last >= depth:
        raise UserError(f"all of the {depth} layers are protected; at least one must lose heads or channels")
    ragged = recipe.layout == "remote-code"
    # what plain classes hold does not matter for parts of heads with code of their own, and is another question below
    aside = (RESIDUAL, *WITHIN_HEADS) if ragged else (RESIDUAL,)
    room = Room.of(model, config, roles, [one for one in settings.units or usual if one not in aside])
    units = {(one.layer, one.kind): one for one in find_units(roles, _kinds(roles, room, settings.units, usual))}
    _check_kinds(recipe, roles, {kind for _, kind in units})
    free = range(settings.protect_first, depth - settings.protect_last)
    losing = {place: one for place, one in units.items() if place[0] in free}
    needed = _parameters_to_go(model, roles, recipe)
    hidden = None
    if HIDDEN in units:
        rest = sum(one.cost * one.count for one in losing.values())
        hidden, lost = _narrow_hidden(model, config, roles, recipe, units[HIDDEN], rest, needed)
        needed = max(needed - lost, 0)
        narrower = find_units(roles, list(dict.fromkeys(kind for _, kind in losing)), hidden.shapes())
        losing = {place: one for one in narrower if (place := (one.layer, one.kind)) in losing}
    # where heads become zeros, any number of them may
    heads = room.heads or range(1, max((one.size for one in units.values() if one.kind in HEADS), default=1))
    demand = Demand(losing, needed, heads, settings.round_to, settings.temperature)
    # called when the plan is there
    always = {HIDDEN: len(hidden.removed[HIDDEN])} if hidden else {}
    search = Evolution(demand, settings.generations, settings.offspring, recipe.seed) if spread.searched else None
    asked = _asked(roles, units, demand, spread, always, search, lambda names: _check_biases(plan, names))
    plan: WidthPlan = WidthPlan(
        model,
        config,
        roles,
        room,
        asked,
        {name: one.shape for name, one in model.named_parameters()},
        ragged,
    )
    plan.config_of(plan.example())
    return plan


def _check_kinds(recipe: Recipe, roles: Roles, kinds: set[str]) -> None:
    """Whether these units can go with this layout and step; raises UserError."""
    step, ragged = recipe.width.round_to, recipe.layout == "remote-code"
    if kinds & {EXPERT_CHANNEL, RESIDUAL} and any(one.experts for one in roles.layers) and step % EXPERT_STEP:
        raise UserError(
            f"width.round_to={step} gives the products of fused experts sizes that they do not take: "
            f"name a multiple of {EXPERT_STEP}"
        )
    if ragged and EXPERT_CHANNEL in kinds:
        raise UserError(
            "layout=remote-code gives layers heads and channels of their own number, but the products of fused experts want "
            f"even sizes: the experts of every layer have one width. Name other units, as width.units={KV_GROUP}"
        )
    if ragged and RESIDUAL in kinds:
        raise UserError(f"{RESIDUAL} dimensions go in the whole model alike; leave the layout plain")


def check_width(recipe: Recipe) -> None:
    """Whether a recipe says how much of the width goes; raises UserError."""
    recipe.check_share()
    for kind in recipe.width.units:
        if kind not in KINDS:
            raise UserError(f"unknown unit {kind!r}{nearest(kind, list(KINDS))}")
    if set(recipe.width.units) >= {KV_GROUP, QUERY_HEAD}:
        raise UserError(f"units {KV_GROUP} and {QUERY_HEAD} overlap; take out one of them")
    parts = [kind for kind in recipe.width.units if kind in WITHIN_HEADS]
    if parts and {KV_GROUP, QUERY_HEAD} & set(recipe.width.units):
        raise UserError(f"units {parts[0]} are parts of heads; take out either heads or {parts[0]}s")


def _asked(
    roles: Roles,
    units: dict[Place, Units],
    demand: Demand,
    entry: Entry,
    always: Mapping[Place, int],
    search: Evolution | None,
    check_biases: Any,
) -> Narrow:
    """`always`: what goes in any case, beside what `entry` spreads."""
    none = dict.fromkeys(units, 0)

    def spread(scores: Mapping[Place, torch.Tensor]) -> dict[Place, int]:
        return {**none, **always, **(entry.spread(demand, scores) if demand.parameters else {})}

    scored = entry.scored and demand.parameters > 0
    return Narrow(roles, units, spread, scored, check_biases, search, scored and entry.influence)


def _narrow_hidden(
    model: PreTrainedModel, config: Any, roles: Roles, recipe: Recipe, units: Units, rest: int, needed: int
) -> tuple[Slicing, int]:
    """The edit that takes out dimensions of the hidden state, and how many of the `needed` parameters go with them.

    Hidden state and other units (`rest`: all their parameters) lose equal shares. Raises UserError where no plain class
    has the result.
    """
    known = roles.layout.narrow_hidden
    if known is None or model.config.model_type not in known.types:
        raise UserError(f"no plain class holds a {type(model).__name__} with fewer dimensions of the hidden state")
    shapes = {name: one.shape for name, one in model.named_parameters()}
    inside = f"{roles.path}." if recipe.ratio is not None else ""

    def lost(slicing: Slicing) -> int:
        left = slicing.shapes()
        return sum(math.prod(one) - math.prod(left[name]) for name, one in shapes.items() if name.startswith(inside))

    whole = units.count * lost(Slicing([units], shapes, {HIDDEN: [0]}))
    most = math.floor(units.count * (1 - _equal_share(whole, rest, needed)) + 1e-9)
    step = recipe.width.round_to
    for left in range(most // step * step, 0, -step):
        slicing = Slicing([units], shapes, {HIDDEN: range(left, units.count)})
        if holds(model, config, slicing):
            return slicing, lost(slicing)
    raise UserError(
        f"no hidden size of a {type(model).__name__} that is a multiple of {step} leaves so few parameters; ask for less"
    )


def _equal_share(whole: int, rest: int, needed: int) -> float:
    """The share s of the hidden state and of the other units with which `needed` parameters go: s whole + s (1 - s) rest.

    `whole` is what would go with all of the hidden state, `rest` the other units' part of it.
    """
    both = whole + rest
    room = both**2 - 4 * rest * needed
    return (both - math.sqrt(room)) / (2 * rest) if rest and room > 0 else min(needed / whole, 1.0)


def _check_biases(plan: WidthPlan, names: Sequence[str]) -> None:
    slicing = plan.example()
    new = build_skeleton(plan.config_of(slicing, names), torch.float32)
    plan.differ(slicing, new)
    check_shapes(new, slicing, names)


def _kinds(roles: Roles, room: Room, wanted: Sequence[str], usual: Sequence[str]) -> Sequence[str]:
    """The units that go: those asked for, else the usual ones that the class can hold fewer of."""
    lacking = [kind for kind in wanted if not find_units(roles, [kind])]
    if KEY in lacking:
        norm = roles.layers[0].attention.between[0]
        raise UserError(
            f"queries and keys pass {norm}, which reads all dimensions of a head: with fewer of them those that stay would "
            f"change, so no {KEY}s can go; name other units"
        )
    if lacking:
        raise UserError(f"a {type(roles.model).__name__} has no {lacking[0]}s that could go; name other units")
    kinds = wanted or [one for one in usual if one not in room.fixed]
    if not find_units(roles, kinds):
        raise UserError(
            f"no plain class holds a {type(roles.model).__name__} with fewer {' or '.join(wanted or ('heads', 'channels'))}; "
            f"name units that it has, to have them filled with zeros (--set width.units={KV_GROUP},{CHANNEL}), or drop layers"
        )
    return kinds


def _parameters_to_go(model: PreTrainedModel, roles: Roles, recipe: Recipe) -> int:
    """How many parameters are to go, at least."""
    if recipe.ratio is not None:
        layers: int = sum(one.numel() for one in model.get_submodule(roles.path).parameters())
        return round(recipe.ratio * layers)
    whole: int = sum(one.numel() for one in model.parameters())
    wanted = recipe.params or 0
    if not 0 < wanted < whole:
        raise UserError(f"params {wanted:,.0f} must lie between 0 and {whole:,}, which the model has")
    return whole - int(wanted)
