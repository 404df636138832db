"""What turning the hidden state will leave of a model, from its configuration alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from llmprune.arch.discover import expert_blocks
from llmprune.arch.discover import find_units as find_layers
from llmprune.arch.roles import Roles
from llmprune.arch.stream import Stream
from llmprune.arch.units import RESIDUAL, find_units
from llmprune.checkpoint.narrow import narrow_config
from llmprune.checkpoint.remote import add_entries
from llmprune.checkpoint.skeleton import build_skeleton, rebuild_layers
from llmprune.checkpoint.slicing import Place, Slicing
from llmprune.recipe import Recipe
from llmprune.types import UserError


@dataclass(frozen=True)
class RotationPlan:
    """`width` dimensions of the hidden state stay; `shared`: in one basis, which a plain class can hold."""

    model: PreTrainedModel
    config: Any
    stream: Stream
    shared: bool
    width: int = 0

    def config_of(self) -> Any:
        """The new configuration, without what `differ` adds; raises UserError where no class has one."""
        source = copy.deepcopy(self.config)
        if self.shared:
            residual = find_units(self.stream.roles, [RESIDUAL])
            shapes = {name: one.shape for name, one in self.model.named_parameters()}
            gone: dict[Place, range] = {(None, RESIDUAL): range(self.width, self.stream.hidden)}
            source = narrow_config(self.model, source, Slicing(residual, shapes, gone))
        else:
            source.tie_word_embeddings = False  # the head keeps the old basis
        return source

    def differ(self, new: PreTrainedModel, *configs: Any) -> None:
        """Change the layers of an empty model, and what configurations say of them, where no class holds the result."""
        if self.shared:
            return
        roles = self.stream.roles
        outside = {name: [roles.model.get_parameter(name).shape[0], self.width] for name in roles.embeddings}
        entries = [self._entry(index) for index in range(len(self.stream.layers))]
        rebuild_layers(new, roles.path, entries, outside)
        for one in configs:
            add_entries(one, roles.path, entries)
            one.pruned_shapes = outside

    def empty(self) -> PreTrainedModel:
        """The result without weights."""
        new = build_skeleton(self.config_of(), torch.float32)
        self.differ(new)
        return new

    def _entry(self, index: int) -> dict[str, Any]:
        """How a layer differs: `width` dimensions before and after its halves, all of them after the last."""
        prefix = self.stream.prefix(index)
        shapes: dict[str, list[int]] = {}
        halves = []
        for number, half in enumerate(self.stream.layers[index]):
            last = index == len(self.stream.layers) - 1 and number == 1
            after = self.stream.hidden if last else self.width
            for one in half.readers:
                shapes[one.name] = _resized(one.shape, one.input_axis, self.width)
            for one in half.writers:
                shapes[one.name] = _resized(one.shape, one.output_axis, after)
                if one.bias:
                    shapes[one.bias] = [after]
            norm: Any = self.model.get_submodule(prefix + half.norm)
            # the mean square is over fewer entries than it was
            epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)) * self.stream.hidden / self.width
            described = {"norm": half.norm, "modules": list(half.modules), "widths": [self.width, after]}
            halves.append({**described, "epsilon": epsilon})
        return {"shapes": {name.removeprefix(prefix): one for name, one in shapes.items()}, "halves": halves}


def plan_rotation(model: PreTrainedModel, config: Any, recipe: Recipe) -> RotationPlan:
    """Check a recipe against a model, whose weights are not read; `config`: as it was stored. Raises UserError."""
    recipe.check_share()
    stream, shared = Stream(Roles(model)), recipe.layout == "plain"
    layout = stream.roles.layout
    plain = layout.narrow_hidden is not None and model.config.model_type in layout.narrow_hidden.types
    if shared and (stream.centred or not plain):
        raise UserError(
            f"no plain class holds a {type(model).__name__} with fewer dimensions of the hidden state; ask for "
            "layout=remote-code"
        )
    if not shared and any(True for layer in find_layers(model, head=False) for _ in expert_blocks(layer.module)):
        raise UserError(
            "layout=remote-code makes the last layer put out more dimensions than it takes in, but the products of fused "
            "experts take and give the same number; leave the layout plain"
        )
    return _widest(RotationPlan(model, config, stream, shared), recipe)


def _widest(plan: RotationPlan, recipe: Recipe) -> RotationPlan:
    """The plan with the most dimensions, a multiple of `width.round_to`, with which enough parameters go."""
    step, inside = recipe.width.round_to, in_layers(plan.model, plan.stream)
    fewest, most = 1, plan.stream.hidden // step
    while fewest <= most:
        middle = (fewest + most) // 2
        new = replace(plan, width=middle * step).empty()
        if recipe.ratio is not None:
            enough = in_layers(new, plan.stream) <= (1 - recipe.ratio) * inside
        else:
            enough = sum(one.numel() for one in new.parameters()) <= (recipe.params or 0)
        fewest, most = (middle + 1, most) if enough else (fewest, middle - 1)
    if most == 0:
        raise UserError(f"no hidden size that is a multiple of {step} leaves so few parameters")
    return replace(plan, width=most * step)


def in_layers(model: PreTrainedModel, stream: Stream) -> int:
    """How many parameters the decoder layers have."""
    return sum(one.numel() for one in model.get_submodule(stream.roles.path).parameters())


def _resized(shape: torch.Size, axis: int, size: int) -> list[int]:
    return [size if number == axis else one for number, one in enumerate(shape)]
