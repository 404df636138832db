"""A job that turns the residual stream and leaves out dimensions of it (SliceGPT): every parameter gets a new value."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch

from llmprune import record
from llmprune.arch.discover import find_units as find_layers
from llmprune.arch.discover import parameter_count
from llmprune.checkpoint.rotation import Rotation, Turned, aligned
from llmprune.engine.stream import projected, written
from llmprune.engine.trunk import Trunk
from llmprune.plan import Plan
from llmprune.recipe import WEIGHT_KEYS, Recipe
from llmprune.restructuring import Restructuring
from llmprune.rotation_plan import plan_rotation
from llmprune.weights import Resident, Streamed


class Rotating(Restructuring):
    """A checked recipe of a method that turns the hidden state. As for `Job`, creating one writes nothing."""

    @staticmethod
    def check_amount(recipe: Recipe, method: Any) -> None:
        recipe.refuse(("drop_layers", "drop_experts", "allocation", *WEIGHT_KEYS), "makes the hidden state narrower")

    def _make_plan(self) -> Plan:
        self._rotation_plan = plan_rotation(self.model, self._source_config(), self.recipe)
        self._stream, self._one_basis = self._rotation_plan.stream, self._rotation_plan.shared
        return Plan(find_layers(self.model, head=False))

    def describe_plan(self) -> dict[str, Any]:
        plan = super().describe_plan()
        plan["structure"]["hidden"] = self._hidden()
        plan["totals"]["params_after"] = parameter_count(self._rotation_plan.empty())
        return plan

    # Parts of a run.

    def _decide(self, trunk: Trunk, weights: Streamed | Resident) -> Turned:
        turned: Turned = self.method.turn(trunk, self._stream, self._rotation_plan.width, shared=self._one_basis)
        if turned.shared:
            (final,) = self._stream.roles.final_norm
            gain_D = self._stored(final, weights).double().cpu()
            turned.gains[final.removesuffix(".weight")] = gain_D
            if self._tied:
                turned.bases = [aligned(turned.bases[0], gain_D)] * len(turned.bases)
        return turned

    def _settle(self, decision: Turned) -> str:  # type: ignore[override]
        self._turned = decision
        self._rotation = Rotation(self._stream, decision)
        self._new_config, self._new = self._built(self._rotation_plan.config_of())
        self._rotation_plan.differ(self._new, self._new_config, self._new.config)
        self._totals = {"params_before": parameter_count(self.model), "params_after": parameter_count(self._new)}
        return f"{self._rotation_plan.width} of {self._stream.hidden} dimensions of the hidden state stay"

    def _cut_in_place(self) -> None:
        """The model is left as it is; the result is another, since hardly a parameter stays."""
        state = {name: self._rotation.value(name, one.data) for name, one in self.model.named_parameters()}
        state |= self._head(Resident(self.model))
        for index in self._layers():
            state |= self._shortcuts(index, self.dtype)
        self._new.load_state_dict(state, strict=False, assign=True)
        self._new.tie_weights()
        self._new.generation_config = self.model.generation_config
        self.model = self._new.to(self.device)

    def _layers(self) -> list[int]:
        return list(range(len(self.plan.units)))

    def _decided(self) -> dict[str, Any]:
        bases = {str(number): one for number, one in enumerate(self._turned.bases)}
        return {"hidden": self._rotation_plan.width, "bases": record.digest(bases)}

    def _outside(self, parameter: str, tensor: torch.Tensor) -> torch.Tensor:
        return self._rotation.value(parameter, tensor)

    def _beside(self, weights: Streamed) -> dict[str, torch.Tensor]:
        return self._head(weights)

    def _inside(
        self, weights: Streamed, index: int, feeds: dict[str, str], unused: list[str]
    ) -> dict[str, torch.Tensor]:
        assert self.checkpoint is not None
        unit = self.plan.units[index]
        tensors = weights.edited(unit, self._rotation.value)
        if not self._one_basis:
            norm = unit.prefix + self._stream.layers[index][0].norm
            key = weights.routing.group_of(f"{norm}.weight").keys[0]
            for name, one in self._shortcuts(index, weights.storage_dtype(f"{norm}.weight")).items():
                tensors[key.replace(f"{norm.removeprefix(unit.prefix)}.weight", name.removeprefix(unit.prefix))] = one
            biases = [f"{unit.prefix}{half.norm}.bias" for half in self._stream.layers[index]]
            gone = {
                one for name in biases if name in weights.routing.groups for one in weights.routing.group_of(name).keys
            }
            tensors = {name: one for name, one in tensors.items() if name not in gone}
        return tensors | {one: self.checkpoint.tensor(one) for one in unused}

    def _shortcuts(self, index: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The matrices that lead past the halves of a layer."""
        if self._one_basis:
            return {}
        prefix = self._stream.prefix(index)
        return {
            f"{prefix}shortcut_{number}.weight": self._rotation.shortcut(index, number).to(dtype) for number in (0, 1)
        }

    @property
    def _tied(self) -> bool:
        """Whether the head is the embeddings, and stays so."""
        return self._one_basis and self._stream.roles.head is None

    def _head(self, weights: Streamed | Resident) -> dict[str, torch.Tensor]:
        """The output head where it was tied to the embeddings, which are turned while it is not."""
        tied = self.model.all_tied_weights_keys.get(self._rotation.head)
        return {} if self._one_basis or tied is None else {self._rotation.head: self._stored(tied, weights)}

    def _stored(self, name: str, weights: Streamed | Resident) -> torch.Tensor:
        """A parameter outside the layers as it is stored."""
        if isinstance(weights, Resident):
            held: torch.Tensor = self.model.get_parameter(name).data
            return held
        assert self.checkpoint is not None
        return self.checkpoint.tensor(weights.routing.group_of(name).keys[0])

    def _tolerance(self, weights: Streamed) -> float:
        """Every value is new, and rounded to the stored dtype: errors that add up over the halves like a random walk."""
        stored = weights.storage_dtype(self._stream.layers[0][0].readers[0].name)
        return max(1e-3, 4 * float(torch.finfo(stored).eps) * math.sqrt(2 * len(self._stream.layers)))

    def _comparable(self) -> bool:
        return True

    @torch.no_grad()
    def _logits_of_old_model(self, ids: torch.Tensor) -> torch.Tensor:
        """What the old model says if its hidden state is projected onto the bases wherever it is turned."""
        weights = self._weights(writing=False)
        with self.prepared(weights):
            trunk = Trunk(self.model, self.plan.units, [{"input_ids": ids.to(self.device)}], weights)
            bases = [one.to(self.device) for one in self._turned.bases]
            state = projected(self._stream, trunk.enter()[0], bases[0])
            for index, halves in enumerate(self._stream.layers):
                with trunk.loaded(index):
                    for number, half in enumerate(halves):
                        state = state + written(trunk, index, 0, number, half, state)
                        state = projected(self._stream, state, bases[2 * index + number + 1])
            with self._tied_head(bases[-1]):
                return trunk.logits(0, state)

    @contextlib.contextmanager
    def _tied_head(self, basis_Dd: torch.Tensor) -> Iterator[None]:
        """Within, what enters a head that stays tied is projected: the new one reads nothing outside the basis."""

        def project(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return (projected(self._stream, args[0], basis_Dd), *args[1:])

        head: Any = self.model.get_output_embeddings()
        handle = head.register_forward_pre_hook(project) if self._tied else None
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()

    def _structure(self) -> tuple[dict[str, Any], int]:
        structure = {
            "dropped": {"layers": [], "kept_layers": self._layers(), "kept_experts": {}},
            "hidden": self._hidden(),
            "notes": self._turned.notes,
        }
        return structure, 0

    def _hidden(self) -> dict[str, Any]:
        """Dimensions of the hidden state, and whether one basis serves all layers."""
        return {"before": self._stream.hidden, "after": self._rotation_plan.width, "shared": self._one_basis}
