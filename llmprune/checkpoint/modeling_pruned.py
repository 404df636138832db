"""A pruned model whose layers differ from each other, built from the model's own class in transformers.

The last two classes of this file name that class. It builds the model as it was; then `config.pruned_layers`, which has
one entry a decoder layer, says how each layer differs. The keys of an entry:

`config`: keys of the configuration that have other values in this layer (heads, widths); the layer's own class builds
it anew with them. `absent`: modules that are left out, by path, with what they return: `width` of the zeros, `items`
in the tuple (0: no tuple). `unread`: modules whose output nothing reads any more.

Needs torch and transformers, nothing else; this text was written by llmprune.
"""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn
from transformers import conversion_mapping

PREFIX = "pruned_"


class LayerConfig:
    """The model's configuration with some keys changed for one layer; all others stay shared."""

    def __init__(self, shared: Any, changes: dict[str, Any]) -> None:
        vars(self).update(changes, _shared=shared)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._shared, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._shared, name, value)


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


def rebuild(model: nn.Module, path: str, entries: list[dict[str, Any]]) -> None:
    """Change the decoder layers of `model`, which are the list at `path`, as their entries say."""
    layers: Any = model.get_submodule(path)
    for index, entry in enumerate(entries):
        if "config" in entry:
            before = next(layers[index].parameters())
            layers[index] = type(layers[index])(LayerConfig(model.config, entry["config"]), index)
            layers[index].to(before.device, before.dtype)
        leave_out(layers[index], entry)


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
        rebuild(self, config.pruned_path, config.pruned_layers)  # type: ignore[arg-type]


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
