"""A job that turns the residual stream and leaves out dimensions of it (SliceGPT): every parameter gets a new value."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from llmprune.arch.discover import find_units as find_layers
from llmprune.arch.roles import Roles
from llmprune.arch.stream import Stream
from llmprune.arch.units import RESIDUAL, find_units
from llmprune.checkpoint.narrow import narrow_config
from llmprune.checkpoint.remote import add_entries
from llmprune.checkpoint.rotation import Rotation, Turned
from llmprune.checkpoint.skeleton import rebuild_layers
from llmprune.checkpoint.slicing import Place, Slicing
from llmprune.engine.stream import projected, written
from llmprune.engine.trunk import Trunk
from llmprune.plan import Plan
from llmprune.restructuring import WEIGHT_KEYS, Restructuring, count
from llmprune.types import UserError
from llmprune.weights import Resident, Streamed


class Rotating(Restructuring):
    """A checked recipe of a method that turns the hidden state. As for `Job`, creating one writes nothing."""

    def _check_amount(self) -> None:
        recipe = self.recipe
        self._refuse(("drop_layers", "drop_experts", "allocation", *WEIGHT_KEYS), "makes the hidden state narrower")
        if (recipe.ratio is None) == (recipe.params is None):
            raise UserError(
                f"say how much {recipe.method!r} should take out: ratio=0.25, a share of the decoder layers' parameters, "
                "or params=6e9, the number that the whole model should have"
            )
        if recipe.ratio is not None and not 0 < recipe.ratio < 1:
            raise UserError(f"ratio {recipe.ratio} must lie between 0 and 1: it is a share of the layers' parameters")
        self._shared = recipe.layout == "plain"

    def _make_plan(self) -> Plan:
        plan = Plan(find_layers(self.model, head=False))
        self._stream = Stream(Roles(self.model))
        layout = self._stream.roles.layout
        plain = layout.narrow_hidden is not None and self.config.model_type in layout.narrow_hidden.types
        if self._shared and (self._stream.centred or not plain):
            raise UserError(
                f"no plain class holds a {type(self.model).__name__} with fewer dimensions of the hidden state; ask for "
                "layout=remote-code"
            )
        self._width = self._choose_width()
        return plan

    def _choose_width(self) -> int:
        """The most dimensions, a multiple of `width.round_to`, with which enough parameters go; raises UserError."""
        recipe, step = self.recipe, self.recipe.width.round_to
        inside = _inside(self.model, self._stream)
        fewest, most = 1, self._stream.hidden // step
        while fewest <= most:
            middle = (fewest + most) // 2
            _, new = self._model_of(middle * step)
            if recipe.params is None:
                enough = _inside(new, self._stream) <= (1 - (recipe.ratio or 0)) * inside
            else:
                enough = count(new) <= recipe.params
            fewest, most = (middle + 1, most) if enough else (fewest, middle - 1)
        if most == 0:
            raise UserError(f"no hidden size that is a multiple of {step} leaves so few parameters")
        return most * step

    def _model_of(self, width: int) -> tuple[Any, PreTrainedModel]:
        """Configuration and empty model of a hidden state of `width` dimensions; raises UserError."""
        stream, source = self._stream, self._source_config()
        if self._shared:
            residual = find_units(stream.roles, [RESIDUAL])
            shapes = {name: one.shape for name, one in self.model.named_parameters()}
            gone: dict[Place, range] = {(None, RESIDUAL): range(width, stream.hidden)}
            source = narrow_config(self.model, source, Slicing(residual, shapes, gone))
        # the head takes up the gain of the last norm, or keeps the old basis
        source.tie_word_embeddings = False
        config, new = self._built(source)
        if not self._shared:
            outside = {name: [one.shape[0], width] for name, one in self._embeddings().items()}
            entries = [self._entry(index, width) for index in range(len(stream.layers))]
            rebuild_layers(new, stream.roles.path, entries, outside)
            for one in (config, new.config):
                add_entries(one, stream.roles.path, entries)
                one.pruned_shapes = outside
        return config, new

    def _embeddings(self) -> dict[str, torch.Tensor]:
        return {name: self.model.get_parameter(name) for name in self._stream.roles.embeddings}

    def _entry(self, index: int, width: int) -> dict[str, Any]:
        """How a layer differs: `width` dimensions before and after its halves, all of them after the last."""
        stream, prefix = self._stream, self._stream.prefix(index)
        shapes: dict[str, list[int]] = {}
        halves = []
        for number, half in enumerate(stream.layers[index]):
            last = index == len(stream.layers) - 1 and number == 1
            after = stream.hidden if last else width
            for one in half.readers:
                shapes[one.name] = _resized(one.shape, one.input_axis, width)
            for one in half.writers:
                shapes[one.name] = _resized(one.shape, one.output_axis, after)
                if one.bias:
                    shapes[one.bias] = [after]
            norm: Any = self.model.get_submodule(prefix + half.norm)
            epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)) * stream.hidden / width
            described = {"norm": half.norm, "modules": list(half.modules), "widths": [width, after]}
            halves.append({**described, "epsilon": epsilon})
        return {"shapes": {name.removeprefix(prefix): one for name, one in shapes.items()}, "halves": halves}

    # Parts of a run.

    def _decide(self, trunk: Trunk, weights: Streamed | Resident) -> Turned:
        turned: Turned = self.method.turn(trunk, self._stream, self._width, shared=self._shared)
        if turned.shared:
            (final,) = self._stream.roles.final_norm
            turned.gains[final.removesuffix(".weight")] = self._stored(final, weights).double().cpu()
        return turned

    def _settle(self, decision: Turned) -> str:  # type: ignore[override]
        self._turned = decision
        self._rotation = Rotation(self._stream, decision)
        self._new_config, self._new = self._model_of(self._width)
        self._totals = {"params_before": count(self.model), "params_after": count(self._new)}
        return f"{self._width} of {self._stream.hidden} dimensions of the hidden state stay"

    def _cut_in_place(self) -> None:
        """The model is left as it is; the result is another, since hardly a parameter stays."""
        state = {name: self._rotation.value(name, one.data) for name, one in self.model.named_parameters()}
        state |= self._head(Resident(self.model))
        for index in self._layers():
            state |= self._shortcuts(index, self.dtype)
        self._new.load_state_dict(state, strict=False, assign=True)
        self._new.generation_config = self.model.generation_config
        self.model = self._new.to(self.device)

    def _layers(self) -> list[int]:
        return list(range(len(self.plan.units)))

    def _decided(self) -> dict[str, Any]:
        return {"hidden": self._width}

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
        if not self._shared:
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
        if self._shared:
            return {}
        prefix = self._stream.prefix(index)
        return {
            f"{prefix}shortcut_{number}.weight": self._rotation.shortcut(index, number).to(dtype) for number in (0, 1)
        }

    def _head(self, weights: Streamed | Resident) -> dict[str, torch.Tensor]:
        """The output head where it was tied to the embeddings, and cannot be any more."""
        tied = self.model.all_tied_weights_keys.get(self._rotation.head)
        return (
            {}
            if tied is None
            else {self._rotation.head: self._rotation.value(self._rotation.head, self._stored(tied, weights))}
        )

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
        return max(1e-3, 4 * torch.finfo(stored).eps * (2 * len(self._stream.layers)) ** 0.5)

    def _comparable(self) -> bool:
        return True

    @torch.no_grad()
    def _logits_of_old_model(self, ids: torch.Tensor) -> torch.Tensor:
        """What the old model says if its hidden state is projected onto the bases wherever it is turned."""
        weights = self._weights(writing=False)
        with self._prepared(weights):
            trunk = Trunk(self.model, self.plan.units, [{"input_ids": ids.to(self.device)}], weights)
            bases = [one.to(self.device) for one in self._turned.bases]
            state = projected(self._stream, trunk.enter()[0], bases[0])
            for index, halves in enumerate(self._stream.layers):
                with trunk.loaded(index):
                    for number, half in enumerate(halves):
                        state = state + written(trunk, index, 0, number, half, state)
                        state = projected(self._stream, state, bases[2 * index + number + 1])
            return trunk.logits(0, state)

    def _structure(self) -> tuple[dict[str, Any], int]:
        structure = {
            "dropped": {"layers": [], "kept_layers": self._layers(), "kept_experts": {}},
            "hidden": {"before": self._stream.hidden, "after": self._width, "shared": self._shared},
            "notes": self._turned.notes,
        }
        return structure, 0


def _inside(model: PreTrainedModel, stream: Stream) -> int:
    """Parameters of the decoder layers."""
    return sum(one.numel() for one in model.get_submodule(stream.roles.path).parameters())


def _resized(shape: torch.Size, axis: int, size: int) -> list[int]:
    return [size if number == axis else one for number, one in enumerate(shape)]
