"""A pruned model whose layers differ from each other, built from the model's own class in transformers.

The last two classes of this file name that class. It builds the model as it was; then `config.pruned_layers`, which has
one entry a decoder layer, says how each layer differs. The keys of an entry:

`config`: keys of the configuration that have other values in this layer (heads, widths); the layer's own class builds
it anew with them. `absent`: modules that are left out, by path, with what they return: `width` of the zeros, `items`
in the tuple (0: no tuple). `unread`: modules whose output nothing reads any more. `shapes`: parameters of other shapes.
`heads`: matrices whose outputs or inputs are fewer dimensions of each head than the rest of the attention knows of.
`experts`: blocks of fewer experts than the router has rows, by path: `config` of the block, and `rows`, the expert for
each row. `halves`: for a layer whose hidden state is narrower and turned, the norm, the modules and the shortcut matrix of
attention and of MLP (see `turned_forward`). `config.pruned_shapes` has shapes of parameters outside the layers.

Needs torch and transformers, nothing else; this text was written by llmprune.
"""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

import torch
import transformers
from torch import nn
from transformers import conversion_mapping

PREFIX = "pruned_"


class LayerConfig:
    """The model's configuration with some keys changed for one layer; all others stay shared."""

    def __init__(self, shared: Any, changes: dict[str, Any]) -> None:
        vars(self).update(changes, shared=shared)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.shared, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "shared":
            vars(self)[name] = value
        else:
            setattr(self.shared, name, value)


class Absent(nn.Module):
    """Stands for a module that is left out: puts out zeros, so that the residual stream passes unchanged."""

    def __init__(self, width: int, items: int, layer_idx: int | None) -> None:
        super().__init__()
        self.width, self.items, self.layer_idx = width, items, layer_idx

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        values = (*args, *kwargs.values())
        cache = next((one for one in values if isinstance(one, transformers.Cache)), None)
        if cache is not None and self.layer_idx is not None:
            # a cache counts its tokens by what it holds of some layer, so every layer must put in something
            token = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
            cache.update(token, token, self.layer_idx)
        zeros = hidden.new_zeros(*hidden.shape[:-1], self.width)
        return (zeros, *[None] * (self.items - 1)) if self.items else zeros


def rebuild(model: nn.Module, path: str, entries: list[dict[str, Any]], shapes: dict[str, list[int]]) -> None:
    """Change the decoder layers of `model`, which are the list at `path`, as their entries say; and other `shapes`."""
    layers: Any = model.get_submodule(path)
    reshape(model, shapes)
    for index, entry in enumerate(entries):
        if "config" in entry:
            before = next(layers[index].parameters())
            layers[index] = type(layers[index])(LayerConfig(model.config, entry["config"]), index)
            layers[index].to(before.device, before.dtype)
        reshape(layers[index], entry.get("shapes", {}))
        for one in entry.get("heads", ()):
            narrow_heads(layers[index].get_submodule(one["module"]), one)
        for name, experts in entry.get("experts", {}).items():
            share_experts(layers[index], name, LayerConfig(model.config, experts["config"]), experts["rows"])
        if "halves" in entry:
            turn(layers[index], entry["halves"])
        leave_out(layers[index], entry)


def reshape(module: nn.Module, shapes: dict[str, list[int]]) -> None:
    """Give parameters, by their path in `module`, other shapes; their values are not kept."""
    for name, shape in shapes.items():
        owner, _, short = name.rpartition(".")
        before = module.get_parameter(name)
        holder: Any = module.get_submodule(owner)
        setattr(holder, short, nn.Parameter(before.new_empty(shape), before.requires_grad))
        if isinstance(holder, nn.Linear):
            holder.out_features, holder.in_features = holder.weight.shape
        elif isinstance(holder, nn.Embedding):
            holder.embedding_dim = holder.weight.shape[1]
        elif hasattr(holder, "nf"):
            holder.nf = holder.weight.shape[1]


def narrow_heads(module: nn.Module, entry: dict[str, Any]) -> None:
    """Between a matrix and the rest of the attention stand heads of full width: zeros where dimensions are gone."""
    wide, kept = entry["width"], entry["kept"]
    index = [head * wide + one for head, dimensions in enumerate(kept) for one in dimensions]
    if entry["side"] == "outputs":
        module.register_forward_hook(partial(_fill_heads, index, len(kept) * wide))
    else:
        module.register_forward_pre_hook(partial(_take_from_heads, index))


def _fill_heads(index: list[int], width: int, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    whole = output.new_zeros(*output.shape[:-1], width)
    return whole.index_copy(-1, torch.tensor(index, device=output.device), output)


def _take_from_heads(index: list[int], module: nn.Module, args: Any) -> Any:
    return args[0][..., index], *args[1:]


def share_experts(layer: nn.Module, name: str, config: Any, rows: list[int]) -> None:
    """Build a block of experts with fewer of them; several router rows may then lead to one."""
    before = next(layer.get_submodule(name).parameters())
    block = type(layer.get_submodule(name))(config)
    block.register_forward_pre_hook(partial(_follow_rows, rows), with_kwargs=True)
    layer.set_submodule(name, block.to(before.device, before.dtype))


def _follow_rows(rows: list[int], block: nn.Module, args: Any, kwargs: Any) -> Any:
    """Experts that were chosen by their router row, as their numbers in the block. Gates of one expert add up there."""

    def followed(value: Any) -> Any:
        is_choice = isinstance(value, torch.Tensor) and not value.is_floating_point()
        return torch.tensor(rows, device=value.device)[value] if is_choice else value

    return tuple(map(followed, args)), {name: followed(one) for name, one in kwargs.items()}


def turn(layer: nn.Module, halves: list[dict[str, Any]]) -> None:
    """Make a layer run its halves in their own bases, on hidden states that are narrower than the model was."""
    like = next(layer.parameters())
    for number, half in enumerate(halves):
        width, after = half["widths"]
        norm = nn.RMSNorm(width, eps=half["epsilon"])
        shortcut = nn.Linear(width, after, bias=False)
        layer.set_submodule(half["norm"], norm.to(like.device, like.dtype))
        layer.add_module(f"shortcut_{number}", shortcut.to(like.device, like.dtype))
    layer.turned = halves  # type: ignore[assignment]
    layer.forward = MethodType(turned_forward, layer)  # type: ignore[method-assign]


def turned_forward(layer: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """x <- x S_0 + attention(norm(x)), then x <- x S_1 + MLP(norm(x)): each shortcut leads into the next basis."""
    for number, half in enumerate(layer.turned):
        output = layer.get_submodule(half["norm"])(hidden_states)
        for name in half["modules"]:
            module = layer.get_submodule(name)
            output = module(output, *args, **kwargs) if number == 0 else module(output)
        output = output[0] if isinstance(output, tuple) else output
        hidden_states = layer.get_submodule(f"shortcut_{number}")(hidden_states) + output
    return hidden_states


def leave_out(layer: nn.Module, entry: dict[str, Any]) -> None:
    """Put stand-ins where the entry of a layer says that modules are absent or unread."""
    for name, output in entry.get("absent", {}).items():
        place = getattr(layer.get_submodule(name), "layer_idx", None)
        layer.set_submodule(name, Absent(output["width"], output["items"], place))
    for name in entry.get("unread", ()):
        layer.set_submodule(name, nn.Identity())


class Pruned:
    """Mixed into the model's class: the model as its configuration says, then rebuilt."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # the library finds how checkpoints are renamed and fused by the name of the class first
        known = conversion_mapping.get_checkpoint_conversion_mapping(cls.__bases__[1].__name__)
        if known is not None:
            conversion_mapping.register_checkpoint_conversion_mapping(cls.__name__, known, overwrite=True)

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: the parameters are those of a class of transformers, so its conversions of checkpoints apply."""
        return False

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        shapes = getattr(config, "pruned_shapes", {})
        rebuild(self, config.pruned_path, config.pruned_layers, shapes)  # type: ignore[arg-type]


class Marked:
    """Mixed into the configuration's class: on disk its `model_type` is one that no plain class answers to.

    Without this file a loader must refuse the checkpoint; as the plain type it would fill absent modules at random.
    """

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return {**found, "model_type": PREFIX + self.model_type}  # type: ignore[attr-defined]

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> Any:
        found, rest = super().get_config_dict(*args, **kwargs)  # type: ignore[misc]
        return {**found, "model_type": cls.model_type}, rest  # type: ignore[attr-defined]
