"""A job that takes out heads and channels, as many in every layer as a plain class needs to hold the result."""

from __future__ import annotations

import math
from typing import Any

import torch

from llmprune import record
from llmprune.arch.discover import find_units as find_layers
from llmprune.arch.discover import parameter_count
from llmprune.checkpoint.narrow import check_shapes
from llmprune.checkpoint.slicing import HIDDEN, Slicing
from llmprune.checkpoint.surgery import graft
from llmprune.engine.trunk import States, Trunk
from llmprune.methods.structural import Narrow, Narrowed
from llmprune.plan import Plan
from llmprune.recipe import WEIGHT_KEYS, Recipe
from llmprune.restructuring import Restructuring
from llmprune.weights import Resident, Streamed
from llmprune.width_plan import check_width, plan_width


class Narrowing(Restructuring):
    """A checked recipe of a width method. As for `Job`, creating one writes nothing."""

    @staticmethod
    def check_amount(recipe: Recipe, method: Any) -> None:
        recipe.refuse(("drop_layers", "drop_experts", *WEIGHT_KEYS), "takes out heads and channels")
        check_width(recipe)

    def _make_plan(self) -> Plan:
        usual = self.method.whole if self.recipe.layout == "remote-code" else ()
        self._width = plan_width(self.model, self._source_config(), self.recipe, usual)
        self._asked: Narrow = self._width.asked
        self.method.check(self.model, self._asked)
        self._slicing = self._width.example()
        return Plan(find_layers(self.model, head=False))

    def _reads_text(self) -> bool:
        return super()._reads_text() or self._asked.influence

    def describe_plan(self) -> dict[str, Any]:
        plan = super().describe_plan()
        if not self._asked.scored:
            plan["structure"] |= {"widths": widths(self._slicing)}
            plan["totals"]["params_after"] = parameter_count(self.model) - self._slicing.parameters_removed
        return plan

    # Parts of a run.

    def _decide(self, trunk: Trunk, weights: Streamed | Resident) -> Narrowed:
        narrowed: Narrowed = self.method.decide(trunk, self._asked)
        return narrowed

    def _settle(self, decision: Any) -> str:
        self._narrowed: Narrowed = decision
        self._slicing = self._width.sliced(decision.removed)
        self._new_config, self._new = self._built(self._width.config_of(self._slicing, list(decision.biases)))
        self._width.differ(self._slicing, self._new, self._new_config, self._new.config)
        check_shapes(self._new, self._slicing, decision.biases)
        self._totals = {"params_before": parameter_count(self.model), "params_after": parameter_count(self._new)}
        return "; ".join(f"{kind}: {', '.join(map(str, sizes))} stay" for kind, sizes in widths(self._slicing).items())

    def _cut_in_place(self) -> None:
        """A model whose class cannot hold the result is left as it is; the result is then one of the other class."""
        state = {name: self._final(name, one.data) for name, one in self.model.named_parameters()}
        for name, one in self._new.named_parameters():
            if name.endswith(".bias") and name not in state and name not in self._new.all_tied_weights_keys:
                state[name] = self._new_bias(name, one.shape).to(self.device, self.dtype)
        if type(self._new) is type(self.model):
            graft(self.model, self._new, self._width.roles.path, state, range(len(self.plan.units)))
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
        removed = {f"{layer} {kind}": list(gone) for (layer, kind), gone in self._slicing.removed.items()}
        return {**removed, "values": record.digest({**self._narrowed.values, **self._narrowed.biases})}

    def _outside(self, parameter: str, tensor: torch.Tensor) -> torch.Tensor:
        return self._final(parameter, tensor)

    def _inside(
        self, weights: Streamed, index: int, feeds: dict[str, str], unused: list[str]
    ) -> dict[str, torch.Tensor]:
        assert self.checkpoint is not None
        unit = self.plan.units[index]
        tensors = weights.edited(unit, self._final)
        for name, one in self._new.named_parameters():
            if name.startswith(unit.prefix) and name not in self._width.shapes:
                weight = f"{name.removesuffix('bias')}weight"
                key = weights.routing.group_of(weight).keys[0]
                dtype = weights.storage_dtype(weight)
                tensors[f"{key.removesuffix('weight')}bias"] = self._new_bias(name, one.shape).to(dtype)
        return tensors | {key: self.checkpoint.tensor(key) for key in unused}

    def _comparable(self) -> bool:
        return True

    def _tolerance(self, weights: Streamed) -> float:
        if HIDDEN not in self._slicing.units:
            return super()._tolerance(weights)
        # every norm has a new gain, rounded to the stored dtype: errors that add up like a random walk
        stored = weights.storage_dtype(self._width.roles.layers[0].norms[0])
        return max(super()._tolerance(weights), 4 * float(torch.finfo(stored).eps) * math.sqrt(2 * len(self._layers())))

    def _entering(self, states: States) -> States:
        gone = self._slicing.removed.get(HIDDEN, ())
        return [one.index_fill(-1, torch.tensor(gone, device=one.device), 0) for one in states] if gone else states

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
                "name": kind if layer is None else f"{self.plan.units[layer].name} {kind}",
                "kept": self._slicing.kept((layer, kind)),
                "scores": self._narrowed.scores[(layer, kind)].tolist(),
            }
            for layer, kind in self._slicing.units
        ]
        structure = {
            "dropped": {"layers": [], "kept_layers": self._layers(), "kept_experts": {}},
            "units": rows,
            "widths": widths(self._slicing),
            "changed": sorted([*self._narrowed.values, *self._narrowed.biases]),
            "notes": self._narrowed.notes,
        }
        return structure, self._slicing.parameters_zeroed

    def _warnings(self) -> list[str]:
        zeros = self._slicing.parameters_zeroed
        why = "layers differ in width, or the class fixes it"
        return [f"{zeros:,} parameters stay as zeros, since {why}: no smaller and no faster for them"] if zeros else []


def widths(slicing: Slicing) -> dict[str, list[int]]:
    """How many units of every kind stay (in each expert): layer by layer, or once if all layers have as many."""
    kept: dict[str, list[int]] = {}
    for place, one in slicing.units.items():
        each = one.strata if one.stacked else 1
        kept.setdefault(one.kind, []).append((one.count - len(slicing.removed[place])) // each)
    return {kind: counts if len(set(counts)) > 1 else counts[:1] for kind, counts in kept.items()}
