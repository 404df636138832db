"""What a width recipe will do to a model, from its configuration alone: how much goes, and what class holds the rest."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from llmprune.allocation.widths import HEADS, Demand, Entry, spread_of
from llmprune.arch.roles import Roles
from llmprune.arch.units import CHANNEL, EXPERT_CHANNEL, KV_GROUP, QUERY_HEAD, Units, find_units
from llmprune.checkpoint.narrow import Room, check_shapes, layer_entries, narrow_config, with_biases
from llmprune.checkpoint.remote import add_entries
from llmprune.checkpoint.skeleton import build_skeleton, rebuild_layers
from llmprune.checkpoint.slicing import Place, Slicing
from llmprune.methods.structural import Narrow
from llmprune.recipe import Recipe, nearest
from llmprune.types import UserError

KINDS = (KV_GROUP, QUERY_HEAD, CHANNEL, EXPERT_CHANNEL)
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
        return with_biases(config, biases) if biases else config

    def differ(self, slicing: Slicing, new: PreTrainedModel, *configs: Any) -> None:
        """Where every layer may have a width of its own: change those of an empty model, and tell configurations."""
        if self.ragged:
            entries = layer_entries(self.config, slicing, len(self.roles.layers))
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


def plan_width(model: PreTrainedModel, config: Any, recipe: Recipe) -> WidthPlan:
    """Check a width recipe against a model, whose weights are not read; `config`: as it was stored. Raises UserError."""
    check_width(recipe)
    settings, spread = recipe.width, spread_of(recipe.allocation or "uniform")
    roles = Roles(model)
    depth = len(roles.layers)
    if settings.protect_first + settings.protect_last >= depth:
        raise UserError(f"all of the {depth} layers are protected; at least one must lose heads or channels")
    room = Room.of(model, config, roles, settings.units or USUAL)
    units = {(one.layer, one.kind): one for one in find_units(roles, _kinds(roles, room, settings.units))}
    if any(one.kind == EXPERT_CHANNEL for one in units.values()) and settings.round_to % EXPERT_STEP:
        raise UserError(
            f"width.round_to={settings.round_to} gives the products of fused experts sizes that they do not take: "
            f"name a multiple of {EXPERT_STEP}"
        )
    ragged = recipe.layout == "remote-code"
    if ragged and any(one.kind == EXPERT_CHANNEL for one in units.values()):
        raise UserError(
            "layout=remote-code gives layers heads and channels of their own number, but the products of fused experts want "
            f"even sizes: the experts of every layer have one width. Name other units, as width.units={KV_GROUP}"
        )
    free = range(settings.protect_first, depth - settings.protect_last)
    losing = {place: one for place, one in units.items() if place[0] in free}
    # where heads become zeros, any number of them may
    heads = room.heads or range(1, max((one.size for one in units.values() if one.kind in HEADS), default=1))
    demand = Demand(losing, _parameters_to_go(model, roles, recipe), heads, settings.round_to)
    # called when the plan is there
    asked = _asked(roles, units, demand, spread, lambda names: _check_biases(plan, names))
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


def check_width(recipe: Recipe) -> None:
    """Whether a recipe says how much of the width goes; raises UserError."""
    if (recipe.ratio is None) == (recipe.params is None):
        raise UserError(
            f"say how much {recipe.method!r} should take out: ratio=0.25, a share of the decoder layers' parameters, "
            "or params=6e9, the number that the whole model should have"
        )
    if recipe.ratio is not None and not 0 < recipe.ratio < 1:
        raise UserError(f"ratio {recipe.ratio} must lie between 0 and 1: it is a share of the layers' parameters")
    for kind in recipe.width.units:
        if kind not in KINDS:
            raise UserError(f"unknown unit {kind!r}{nearest(kind, list(KINDS))}")
    if set(recipe.width.units) >= {KV_GROUP, QUERY_HEAD}:
        raise UserError(f"units {KV_GROUP} and {QUERY_HEAD} overlap; take out one of them")


def _asked(roles: Roles, units: dict[Place, Units], demand: Demand, entry: Entry, check_biases: Any) -> Narrow:
    none = dict.fromkeys(units, 0)

    def spread(scores: Mapping[Place, torch.Tensor]) -> dict[Place, int]:
        return {**none, **entry.spread(demand, scores)}

    return Narrow(roles, units, spread, entry.scored, check_biases)


def _check_biases(plan: WidthPlan, names: Sequence[str]) -> None:
    slicing = plan.example()
    new = build_skeleton(plan.config_of(slicing, names), torch.float32)
    plan.differ(slicing, new)
    check_shapes(new, slicing, names)


def _kinds(roles: Roles, room: Room, wanted: Sequence[str]) -> Sequence[str]:
    """The units that go: those asked for, else the usual ones that the class can hold fewer of."""
    kinds = wanted or [one for one in USUAL if one not in room.fixed]
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
