"""Structural edits of a model: which layers and experts stay, as one value, and how a checkpoint follows it.

What must be cut is read off two skeletons, of the old and of the new configuration: a tensor whose
shape differs between them is cut along the axis that differs. A kept layer must be the same kind of
layer at its new place; where a configuration cannot say so, the edit is refused before work starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from llmprune.arch.discover import decoder_layers, expert_blocks, expert_count
from llmprune.checkpoint.layer_lists import edit_config, expert_keys
from llmprune.checkpoint.modeling_pruned import LayerConfig
from llmprune.types import RunError, UserError


@dataclass(frozen=True)
class Surgery:
    """What becomes of a model of `depth` layers; every index counts in the model as it was.

    `layers`: those that stay, in order. `experts`: which experts of a layer stay, in order; layers not
    named keep all. `replaced`: parameters that get other values, by name, in their shape before the cut.
    `rows`: which of the experts that stay, by its old number, answers each router row of a layer; without it those rows
    go whose experts go. `silent`: halves (attention, MLP) of layers that put out nothing. `entries`: how layers then differ from what
    their class builds, for `modeling_pruned`.
    """

    depth: int
    layers: tuple[int, ...]
    experts: dict[int, tuple[int, ...]] = field(default_factory=dict)
    replaced: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: dict[int, tuple[int, ...]] = field(default_factory=dict)
    silent: dict[int, tuple[str, ...]] = field(default_factory=dict)
    entries: dict[int, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def drop(cls, depth: int, dropped: Iterable[int]) -> Surgery:
        """Leave out the layers `dropped` and nothing else."""
        gone = set(dropped)
        return cls(depth, tuple(index for index in range(depth) if index not in gone))

    @property
    def dropped(self) -> tuple[int, ...]:
        return tuple(index for index in range(self.depth) if index not in self.layers)

    @property
    def configured(self) -> Surgery:
        """What the configuration has to say of it: not how many experts there are, if all router rows stay."""
        return replace(self, experts={}) if self.rows else self

    def with_values(self, replaced: dict[str, torch.Tensor]) -> Surgery:
        return replace(self, replaced={**self.replaced, **replaced})


def edited_config(model: PreTrainedModel, config: Any, surgery: Surgery) -> Any:
    """The configuration of the model after `surgery`; raises UserError for what it cannot express."""
    layers, surgery = decoder_layers(model)[1], surgery.configured
    counts = {index: blocks[0] for index, layer in enumerate(layers) if (blocks := _expert_counts(layer))}
    kept = {len(surgery.experts.get(index, range(counts[index]))) for index in surgery.layers if index in counts}
    if len(kept) > 1:
        raise UserError(f"layers would keep {sorted(kept)} experts; a configuration holds one number for all of them")
    experts = (counts[min(counts)], kept.pop()) if surgery.experts and kept else None
    sparse = [bool(index in counts) for index in range(surgery.depth)]
    return edit_config(config, surgery.layers, surgery.depth, sparse, experts)


def shared_experts(model: PreTrainedModel, config: Any, surgery: Surgery) -> dict[int, dict[str, Any]]:
    """For `modeling_pruned`: the expert blocks of which fewer experts stay than router rows do."""
    layers, entries = decoder_layers(model)[1], {}
    for index, rows in surgery.rows.items():
        ((path, block),) = expert_blocks(layers[index])
        keys = expert_keys(config.get_text_config(), expert_count(block))
        kept = surgery.experts[index]
        places = [kept.index(expert) for expert in rows]
        entries[index] = {"experts": {path: {"config": dict.fromkeys(keys, len(kept)), "rows": places}}}
    return entries


def _expert_counts(layer: nn.Module) -> list[int]:
    return [expert_count(block) for _, block in expert_blocks(layer)]


class Cutter:
    """Carries tensors of the old model over to the new one: their names, and what is left of them.

    `old` and `new` are models of the two configurations; weights are not read. Raises UserError if
    a kept layer would be another kind of layer in the new model. `new` may be rebuilt afterwards: its shapes count
    when tensors are cut.
    """

    def __init__(self, old: PreTrainedModel, new: PreTrainedModel, surgery: Surgery) -> None:
        self.path, old_layers = decoder_layers(old)
        _, new_layers = decoder_layers(new)
        self.surgery = surgery
        self.place = {index: place for place, index in enumerate(surgery.layers)}
        self._shapes = {name: one.shape for name, one in old.state_dict().items()}
        self._new = new
        self._check_tied(old)
        for name, one in new.state_dict().items():
            if not name.startswith(f"{self.path}.") and self._shapes.get(name, one.shape) != one.shape:
                raise UserError(
                    f"{name}, which lies outside the layers, has a part for each of them: none can be dropped"
                )
        if len(new_layers) != len(surgery.layers):
            raise UserError(
                f"{type(old).__name__} takes its number of layers from elsewhere than num_hidden_layers; "
                "its layers cannot be dropped"
            )
        counts = None
        if surgery.configured.experts:
            index, stay = next(iter(surgery.experts.items()))
            counts = (_expert_counts(old_layers[index])[0], len(stay))
        for place, index in enumerate(surgery.layers):
            change = _difference(old_layers[index], new_layers[place], {(index, place), counts})
            if change:
                raise UserError(
                    f"layer {index} would be another kind of layer as number {place} ({change}): "
                    f"{type(old.config).__name__} derives this from the position and has no key for it; "
                    "drop other layers"
                )

    @cached_property
    def _new_shapes(self) -> dict[str, torch.Size]:
        return {name: one.shape for name, one in self._new.state_dict().items()}

    def layer_key(self, key: str, index: int) -> str:
        """The key of a tensor of layer `index` at its new place: its first number is that of the layer."""
        if self.place[index] == index:
            return key
        parts = key.split(".")
        where = next((number for number, part in enumerate(parts) if part.isdigit()), None)
        if where is None or parts[where] != str(index):
            raise UserError(
                f"the checkpoint's name {key!r} does not say that it belongs to layer {index}, which would move to "
                f"{self.place[index]}; drop only layers after it"
            )
        parts[where] = str(self.place[index])
        return ".".join(parts)

    def check_keys(self, owner: dict[str, int]) -> None:
        """Raise UserError if a tensor has no key at its layer's new place; `owner`: the layers of tensors, by key."""
        for key, index in owner.items():
            if index in self.place:
                self.layer_key(key, index)

    def cut(
        self, key: str, parameter: str, tensor: torch.Tensor, index: int, kept: tuple[int, ...] = ()
    ) -> tuple[str, torch.Tensor] | None:
        """Name and value in the new model of the tensor `key` of layer `index`, which feeds `parameter`.

        None if it belonged to an expert or a module that is left out. `kept`: other experts than the edit says, as
        many.
        """
        renamed = self.layer_key(key, index)
        if parameter in self._shapes and self._new_name(parameter, index) not in self._new_shapes:
            return None
        axis = self._axis(parameter, index)
        if axis is None:
            return renamed, tensor
        kept = kept or self.surgery.experts[index]
        number = _expert_number(key)
        # one tensor an expert, where the model has one parameter for all
        if number is not None and tensor.dim() < len(self._shapes[parameter]):
            if number not in kept:
                return None
            return _renumber(renamed, kept.index(number)), tensor
        if tensor.shape[axis] != self._shapes[parameter][axis]:
            raise RunError(f"{key!r} has another shape than {parameter}, so its experts cannot be told apart")
        return renamed, tensor.index_select(axis, torch.tensor(kept, device=tensor.device)).contiguous()

    def saved(self, index: int) -> int:
        """How many parameters each expert that is left out of layer `index` had."""
        prefix = f"{self.path}.{index}."
        total = 0
        for name, shape in self._shapes.items():
            axis = self._axis(name, index) if name.startswith(prefix) else None
            total += 0 if axis is None else shape.numel() // shape[axis]
        return total

    def _axis(self, parameter: str, index: int) -> int | None:
        """Along which axis the experts of a parameter lie; None if it has none or all stay."""
        if parameter not in self._shapes or index not in self.surgery.experts:
            return None
        before = self._shapes[parameter]
        after = self._new_shapes[self._new_name(parameter, index)]
        return next((axis for axis in range(len(before)) if before[axis] != after[axis]), None)

    def _check_tied(self, old: PreTrainedModel) -> None:
        """Raise UserError unless the layers that stay share the same parameters as before, with their own values."""
        prefix = f"{self.path}."

        def moved(name: str) -> str:
            """The name in the new model; "" if it goes."""
            if not name.startswith(prefix):
                return name
            index = int(name.removeprefix(prefix).partition(".")[0])
            return self._new_name(name, index) if index in self.place else ""

        def inside(model: PreTrainedModel) -> dict[str, str]:
            return {name: one for name, one in model.all_tied_weights_keys.items() if name.startswith(prefix)}

        tied, after = inside(old), inside(self._new)
        before = {moved(name): moved(source) for name, source in tied.items() if moved(name)}
        if before != after:
            odd = min(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
            raise UserError(f"{odd} would not share its values with the layer that it does now; drop other layers")
        changed = sorted(self.surgery.replaced.keys() & {*tied, *tied.values()})
        if changed:
            raise UserError(f"{changed[0]} serves several layers, so it cannot be given other values for one of them")

    def _new_name(self, parameter: str, index: int) -> str:
        return f"{self.path}.{self.place[index]}.{parameter.removeprefix(f'{self.path}.{index}.')}"


def cut_in_place(model: PreTrainedModel, new: PreTrainedModel, cutter: Cutter) -> None:
    """Give a loaded model the layers of `new`, filled with its own weights.

    The list of layers is replaced: hooks that the caller put on layers are gone. Everything that a layer
    knows of its place (`layer_idx`, kind of attention, number of experts) comes from the new configuration.
    """
    surgery, path = cutter.surgery, cutter.path
    state = {}
    for index in surgery.layers:
        prefix = f"{path}.{index}."
        for short, tensor in model.get_submodule(path)[index].state_dict().items():
            value = surgery.replaced.get(prefix + short)
            value = tensor if value is None else value.to(tensor.device, tensor.dtype)
            found = cutter.cut(prefix + short, prefix + short, value, index)
            if found is not None:
                state[found[0]] = found[1]
    graft(model, new, path, state, surgery.layers)


def graft(
    model: PreTrainedModel, new: PreTrainedModel, path: str, state: dict[str, torch.Tensor], origins: Sequence[int]
) -> None:
    """Give a loaded model the list of layers of `new` at `path`, filled with `state`, and its configuration.

    `origins`: which old layer each new one was. Values of `state` outside the layers are set where they lie.
    """
    training = decoder_layers(model)[1].training
    fresh = new.get_submodule(path)
    for place, index in enumerate(origins):
        old_layer = model.get_submodule(f"{path}.{index}")
        trainable = {name: one.requires_grad for name, one in old_layer.named_parameters()}
        prefix = f"{path}.{place}."
        layer = fresh.get_submodule(str(place))
        # buffers that are stored and that no edit touches
        kept = {name: one for name, one in old_layer.state_dict().items() if name not in trainable}
        edited = {name.removeprefix(prefix): one for name, one in state.items() if name.startswith(prefix)}
        layer.load_state_dict({**kept, **edited}, assign=True)
        layer.to(model.device)
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(trainable.get(name, False))
    for name, value in state.items():
        if not name.startswith(f"{path}."):
            model.get_parameter(name).data = value
    holder, _, short = path.rpartition(".")
    setattr(model.get_submodule(holder), short, fresh)
    fresh.train(training)
    for mine, theirs in zip(_configs(model.config), _configs(new.config), strict=True):
        for key, value in vars(theirs).items():
            # what begins with an underscore is how the model runs here, not what it is
            if not key.startswith("_") and not isinstance(value, PreTrainedConfig):
                setattr(mine, key, value)
        for module in fresh.modules():
            own = getattr(module, "config", None)
            if own is theirs:
                module.config = mine
            elif isinstance(own, LayerConfig) and own.shared is theirs:
                own.shared = mine
    for name, module in new.named_modules():
        if not f"{name}.".startswith(f"{path}."):
            sizes = {key: one for key, one in vars(module).items() if type(one) in (int, float)}
            vars(model.get_submodule(name)).update(sizes)


def _configs(config: Any) -> list[Any]:
    text = config.get_text_config()
    return [config] if text is config else [config, text]


def _expert_number(key: str) -> int | None:
    numbers = [part for part in key.split(".") if part.isdigit()]
    return int(numbers[1]) if len(numbers) > 1 else None


def _renumber(key: str, number: int) -> str:
    parts = key.split(".")
    second = [place for place, part in enumerate(parts) if part.isdigit()][1]
    parts[second] = str(number)
    return ".".join(parts)


_PLAIN = (bool, int, float, str, type(None))


def _difference(old: nn.Module, new: nn.Module, expected: set[tuple[int, int] | None]) -> str:
    """In what two layers differ; "" if in nothing but whole numbers that change as `expected`: place, experts."""
    mine, theirs = dict(old.named_modules()), dict(new.named_modules())
    # a list of experts may become shorter, where their number changes
    if not theirs.keys() <= mine.keys() or (None in expected and mine.keys() != theirs.keys()):
        odd = min(mine.keys() ^ theirs.keys())
        return f"{odd} is in one of them only"
    for name, module in theirs.items():
        if type(mine[name]) is not type(module):
            return f"{name} is a {type(mine[name]).__name__}, then a {type(module).__name__}"
        for key, value in vars(module).items():
            before = vars(mine[name]).get(key)
            plain = isinstance(value, _PLAIN) and isinstance(before, _PLAIN) and value != before
            if plain and (type(value) is not int or (before, value) not in expected):
                return f"{name}.{key} is {before!r}, then {value!r}".lstrip(".")
        kept = module._non_persistent_buffers_set
        for key in kept:
            before, after = mine[name]._buffers.get(key), module._buffers.get(key)
            if before is not None and after is not None and not torch.equal(before, after.to(before.device)):
                return f"{name}.{key} holds other numbers"
    return ""
