"""A job that takes out heads and channels, as many in every layer as a plain class needs to hold the result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from llmprune.allocation.widths import Demand, spread_of
from llmprune.arch.discover import find_units as find_layers
from llmprune.arch.roles import Roles
from llmprune.arch.units import CHANNEL, EXPERT_CHANNEL, KV_GROUP, QUERY_HEAD, find_units
from llmprune.checkpoint.narrow import Room, check_shapes, narrow_config, with_biases
from llmprune.checkpoint.slicing import Place, Slicing
from llmprune.checkpoint.surgery import graft
from llmprune.methods.structural import Narrow, Narrowed
from llmprune.plan import Plan
from llmprune.recipe import nearest
from llmprune.restructuring import WEIGHT_KEYS, Restructuring, count
from llmprune.types import UserError
from llmprune.weights import Resident, Streamed

KINDS = (KV_GROUP, QUERY_HEAD, CHANNEL, EXPERT_CHANNEL)
USUAL = (KV_GROUP, CHANNEL, EXPERT_CHANNEL)


class Narrowing(Restructuring):
    """A checked recipe of a width method. As for `Job`, creating one writes nothing."""

    def _check_amount(self) -> None:
        recipe = self.recipe
        self._refuse(("drop_layers", "drop_experts", *WEIGHT_KEYS), "takes out heads and channels")
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
        self._allocation = spread_of(recipe.allocation or "uniform")

    def _make_plan(self) -> Plan:
        plan = Plan(find_layers(self.model, head=False))
        settings, depth = self.recipe.width, len(plan.units)
        if settings.protect_first + settings.protect_last >= depth:
            raise UserError(f"all of the {depth} layers are protected; at least one must lose heads or channels")
        self._roles = Roles(self.model)
        self._shapes = {name: one.shape for name, one in self.model.named_parameters()}
        self._room = Room.of(self.model, self._source_config(), self._roles, settings.units or USUAL)
        units = {(one.layer, one.kind): one for one in find_units(self._roles, self._kinds())}
        free = range(settings.protect_first, depth - settings.protect_last)
        losing = {place: one for place, one in units.items() if place[0] in free}
        most = max((one.size for one in units.values() if one.kind in (KV_GROUP, QUERY_HEAD)), default=1)
        heads = self._room.heads or tuple(range(1, most))
        demand = Demand(losing, self._parameters_to_go(), heads, settings.round_to)
        none = dict.fromkeys(units, 0)

        def spread(scores: Mapping[Place, torch.Tensor]) -> dict[Place, int]:
            return {**none, **self._allocation.spread(demand, scores)}

        self._asked: Narrow = Narrow(self._roles, units, spread, self._allocation.scored, self._check_biases)
        # what cannot be had is found before work starts
        self._slicing = self._sliced({place: units[place].first(one) for place, one in self._counts().items()})
        self._config_of(self._slicing)
        return plan

    def _counts(self) -> dict[Place, int]:
        """How many units go, as far as it is known before scores are."""
        return dict.fromkeys(self._asked.units, 0) if self._asked.scored else self._asked.spread({})

    def _kinds(self) -> tuple[str, ...]:
        """The units that go: those asked for, else the usual ones that the class can hold fewer of."""
        kinds = tuple(self.recipe.width.units) or tuple(one for one in USUAL if one not in self._room.fixed)
        if not find_units(self._roles, kinds):
            raise UserError(
                f"no plain class holds a {type(self.model).__name__} with fewer heads or channels; name the units, to have "
                f"them filled with zeros at the same size (--set width.units={KV_GROUP},{CHANNEL}), or drop layers"
            )
        return kinds

    def _parameters_to_go(self) -> int:
        """How many parameters are to go, at least."""
        recipe, inside = self.recipe, f"{self._roles.path}."
        if recipe.ratio is not None:
            layers = sum(shape.numel() for name, shape in self._shapes.items() if name.startswith(inside))
            return round(recipe.ratio * layers)
        whole, wanted = count(self.model), recipe.params or 0
        if not 0 < wanted < whole:
            raise UserError(f"params {wanted:,.0f} must lie between 0 and {whole:,}, which the model has")
        return whole - int(wanted)

    def _sliced(self, removed: Mapping[Place, list[int]]) -> Slicing:
        return Slicing(self._asked.units.values(), self._shapes, removed, held=self._room.fixed)

    def _config_of(self, slicing: Slicing, biases: list[str] | None = None) -> Any:
        """The new configuration; raises UserError where it cannot be."""
        config = narrow_config(self.model, self._source_config(), slicing)
        return with_biases(config, biases) if biases else config

    def _check_biases(self, names: list[str]) -> None:
        check_shapes(self._built(self._config_of(self._slicing, names))[1], self._slicing, names)

    def check(self, *, resume: bool, overwrite: bool) -> None:
        if self.output is not None:
            self.output.check(source=self.folder, resume=resume, overwrite=overwrite)
        self._weights(writing=False)

    def describe_plan(self) -> dict[str, Any]:
        plan = super().describe_plan()
        plan["structure"] |= {"layout": self._widths(), "model_type": self._config_of(self._slicing).model_type}
        plan["totals"]["params_after"] = count(self.model) - self._slicing.parameters_removed
        return plan

    # Parts of a run.

    def _settle(self, decision: Any) -> str:
        self._narrowed: Narrowed = decision
        self._slicing = self._sliced(decision.removed)
        self._new_config, self._new = self._built(self._config_of(self._slicing, list(decision.biases)))
        check_shapes(self._new, self._slicing, decision.biases)
        self._totals = {"params_before": count(self.model), "params_after": count(self._new)}
        return "; ".join(f"{kind}: {', '.join(map(str, sizes))} stay" for kind, sizes in self._widths().items())

    def _cut_in_place(self) -> None:
        """A model whose class cannot hold the result is left as it is; the result is then one of the other class."""
        state = {name: self._final(name, one.data) for name, one in self.model.named_parameters()}
        for name, one in self._new.named_parameters():
            if name.endswith(".bias") and name not in state and name not in self._new.all_tied_weights_keys:
                state[name] = self._new_bias(name, one.shape).to(self.device, self.dtype)
        if type(self._new) is type(self.model):
            graft(self.model, self._new, self._roles.path, state, range(len(self.plan.units)))
        else:
            self._new.load_state_dict(state, strict=False, assign=True)
            self._new.tie_weights()
            self._new.generation_config = self.model.generation_config
            self.model = self._new.to(self.device)

    def _final(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What the new model has for a parameter of the old one."""
        value = self._narrowed.values.get(name, tensor)
        return self._slicing.cut(name, value.to(tensor.device, tensor.dtype))

    def _new_bias(self, name: str, shape: torch.Size) -> torch.Tensor:
        found = self._narrowed.biases.get(name)
        return torch.zeros(shape) if found is None else found

    def _layers(self) -> list[int]:
        return list(range(len(self.plan.units)))

    def _decided(self) -> dict[str, Any]:
        return {f"{layer} {kind}": list(gone) for (layer, kind), gone in self._slicing.removed.items()}

    def _outside(self, parameter: str, tensor: torch.Tensor) -> torch.Tensor:
        return self._final(parameter, tensor)

    def _inside(
        self, weights: Streamed, index: int, feeds: dict[str, str], unused: list[str]
    ) -> dict[str, torch.Tensor]:
        assert self.checkpoint is not None
        unit = self.plan.units[index]
        tensors = weights.edited(unit, self._final)
        for name, one in self._new.named_parameters():
            if name.startswith(unit.prefix) and name not in self._shapes:
                weight = f"{name.removesuffix('bias')}weight"
                key = weights.routing.group_of(weight).keys[0]
                dtype = weights.storage_dtype(weight)
                tensors[f"{key.removesuffix('weight')}bias"] = self._new_bias(name, one.shape).to(dtype)
        return tensors | {key: self.checkpoint.tensor(key) for key in unused}

    def _comparable(self) -> bool:
        return True

    def _changed(self, weights: Streamed | Resident, index: int) -> dict[str, torch.Tensor]:
        unit, slicing, values = self.plan.units[index], self._slicing, self._narrowed.values
        changed = {}
        for short, parameter in unit.module.named_parameters():
            name = unit.prefix + short
            value = values.get(name, parameter.data).to(weights.storage_dtype(name))
            changed[name] = slicing.zeroed(name, value)
        return changed | {name: one for name, one in self._narrowed.biases.items() if name.startswith(unit.prefix)}

    def _structure(self) -> tuple[dict[str, Any], int]:
        rows = [
            {
                "name": f"{self.plan.units[layer or 0].name} {kind}",
                "kept": self._slicing.kept((layer, kind)),
                "scores": self._narrowed.scores[(layer, kind)].tolist(),
            }
            for layer, kind in self._slicing.units
        ]
        structure = {
            "dropped": {"layers": [], "kept_layers": self._layers(), "kept_experts": {}},
            "units": rows,
            "widths": self._widths(),
            "changed": sorted([*self._narrowed.values, *self._narrowed.biases]),
            "notes": self._narrowed.notes,
        }
        return structure, self._slicing.parameters_zeroed

    def _warnings(self) -> list[str]:
        zeros = self._slicing.parameters_zeroed
        why = "layers differ in width, or the class fixes it"
        return [f"{zeros:,} parameters stay as zeros, since {why}: no smaller and no faster for them"] if zeros else []

    def _widths(self) -> dict[str, list[int]]:
        """How many units of every kind stay (in each expert): layer by layer, or once if all layers have as many."""
        kept: dict[str, list[int]] = {}
        for place, one in self._slicing.units.items():
            each = one.strata if one.stacked else 1
            kept.setdefault(one.kind, []).append((one.count - len(self._slicing.removed[place])) // each)
        return {kind: counts if len(set(counts)) > 1 else counts[:1] for kind, counts in kept.items()}
