"""The configuration of a narrower model, in its own class or in one that computes the same and takes more shapes."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedModel

from llmprune.arch.roles import Attention, Layout, Roles, layout_of
from llmprune.arch.units import CHANNEL, EXPERT_CHANNEL, KV_GROUP, QUERY_HEAD, RESIDUAL, WITHIN_HEADS, Units, find_units
from llmprune.checkpoint.skeleton import build_skeleton
from llmprune.checkpoint.slicing import Slicing
from llmprune.types import UserError

# Configuration keys that give the matrices of a half their biases, and how the half is called in parameter names.
BIAS_KEYS = {"attention_bias": "attn", "mlp_bias": "mlp"}


def narrow_config(model: PreTrainedModel, config: Any, slicing: Slicing) -> Any:
    """A copy of `config` for what `slicing` leaves of `model`; raises UserError where no class can say it.

    That the class of the configuration builds exactly these shapes is seen by building it (`check_shapes`).
    """
    layout = layout_of(config)
    edited = copy.deepcopy(config)
    text = edited.get_text_config()
    changes = _changes(text, layout, slicing)
    for key, value in changes.items():
        try:
            setattr(text, key, value)
        except AttributeError as error:
            raise UserError(f"{type(text).__name__} derives its {key} and cannot be told another") from error
    return edited if _accepted(edited) else _hosted(model, edited, layout)


def _changes(text: Any, layout: Layout, slicing: Slicing, layer: int | None = None) -> dict[str, Any]:
    """The new values of configuration keys: for all layers, which are alike, or for one."""
    keys = layout.config
    places = {place: one for place, one in slicing.units.items() if layer is None or place[0] == layer}
    widths = {place[1]: (slicing.width(place), one) for place, one in places.items()}
    changes: dict[str, Any] = {}
    heads = getattr(text, keys.heads)
    for kind in (KV_GROUP, QUERY_HEAD):
        if kind in widths:
            left, units = widths[kind]
            if left < units.count:
                assert units.columns_UN is not None
                changes["head_dim"] = units.columns_UN.numel() // heads
                changes[keys.heads] = changes.get(keys.heads, heads) * left // units.count
                if kind == KV_GROUP and keys.kv_heads:
                    changes[keys.kv_heads] = left
    for kind, key in ((CHANNEL, keys.channels), (EXPERT_CHANNEL, keys.expert_channels)):
        if kind in widths and widths[kind][0] < widths[kind][1].count and key:
            changes[key] = widths[kind][0] // widths[kind][1].strata
    if RESIDUAL in widths and widths[RESIDUAL][0] < widths[RESIDUAL][1].count:
        left, units = widths[RESIDUAL]
        changes.setdefault("head_dim", getattr(text, "head_dim", None) or getattr(text, keys.hidden) // heads)
        changes[keys.hidden] = left
        if layout.narrow_hidden is not None and text.model_type in layout.narrow_hidden.types:
            epsilon = layout.narrow_hidden.epsilon
            changes[epsilon] = getattr(text, epsilon) * units.count / left
    return changes


def layer_entries(config: Any, slicing: Slicing, roles: Roles) -> list[dict[str, Any]]:
    """For `modeling_pruned`: how each layer differs."""
    layout, text = layout_of(config), config.get_text_config()
    entries = []
    for index, layer in enumerate(roles.layers):
        changes = _changes(text, layout, slicing, index)
        entry: dict[str, Any] = {"config": changes} if changes else {}
        if any((index, kind) in slicing.units for kind in WITHIN_HEADS):
            entry |= _heads(slicing, f"{roles.path}.{index}.", layer.attention)
        entries.append(entry)
    return entries


def _heads(slicing: Slicing, prefix: str, attention: Attention) -> dict[str, Any]:
    """The entry of a layer whose heads have fewer dimensions than its attention computes with."""
    shapes, wide = slicing.shapes(), attention.head_dim
    changed: list[str] = []
    heads = []
    for one in (attention.query, attention.key, attention.value, attention.fused, attention.output):
        if one is None or shapes[one.name] == one.shape:
            continue
        side, axis = ("inputs", one.input_axis) if one is attention.output else ("outputs", one.output_axis)
        kept: list[list[int]] = [[] for _ in range(one.shape[axis] // wide)]
        for place in slicing.kept_along(one.name, axis):
            kept[place // wide].append(place % wide)
        module = one.name.removeprefix(prefix).removesuffix(".weight")
        heads.append({"module": module, "side": side, "width": wide, "kept": kept})
        changed += [one.name, *([one.bias] if one.bias and side == "outputs" else [])]
    return {"shapes": {name.removeprefix(prefix): list(shapes[name]) for name in changed}, "heads": heads}


def _accepted(config: Any) -> bool:
    """Whether the class takes its values when they are read again."""
    try:
        type(config).from_dict(config.to_dict())
    except (ValueError, StrictDataclassError):
        return False
    return True


def _hosted(model: PreTrainedModel, config: Any, layout: Layout) -> Any:
    """The configuration as one of the class that stands in for it; raises UserError where there is none."""
    host = layout.host.get(config.model_type)
    if host is None or any(getattr(config, key, None) for key in host.without):
        text = config.get_text_config()
        used = f" with {' or '.join(host.without)}" if host else ""
        raise UserError(
            f"{type(config).__name__} takes no {getattr(text, layout.config.heads)} heads at a hidden size of "
            f"{getattr(text, layout.config.hidden)}, which must divide by it, and no other class stands in for "
            f"{config.model_type} models{used}; choose another amount, or leave the heads alone with units={CHANNEL}"
        )
    data = {key: value for key, value in config.to_dict().items() if key not in ("model_type", *host.without)}
    new = AutoConfig.for_model(host.type)
    architecture = type(model).__name__.replace(_stem(config), _stem(new))
    return type(new).from_dict({**data, **host.set, "architectures": [architecture]})


def _stem(config: Any) -> str:
    return type(config).__name__.removesuffix("Config")


def with_biases(config: Any, parameters: Collection[str], source: Any) -> Any:
    """A copy of `config` that gives the model these biases as well; raises UserError where the class has no key.

    `source`: the configuration of the model before, for which another class may stand in.
    """
    edited = copy.deepcopy(config)
    for key, half in BIAS_KEYS.items():
        if any(half in name for name in parameters):
            if not hasattr(edited.get_text_config(), key):
                same = isinstance(edited, type(source))
                other = "" if same else f", or layout=remote-code, with which it stays a {type(source).__name__}"
                raise UserError(
                    f"{type(edited).__name__} has no {key}, so its layers cannot be given a bias; "
                    f"set compensate=least-squares, or none{other}"
                )
            setattr(edited.get_text_config(), key, True)
    return edited


def check_shapes(new: PreTrainedModel, slicing: Slicing, biases: Collection[str] = ()) -> None:
    """Whether the class of a new configuration builds what `slicing` leaves, and `biases`; raises UserError if not.

    Other biases that come with those asked for are passed over.
    """
    built = {name: one.shape for name, one in new.named_parameters()}
    for name, shape in slicing.shapes().items():
        found = built.pop(name, None)
        if found != shape:
            raise UserError(
                f"{type(new).__name__} cannot hold {name} as {_text(shape)}: its configuration gives "
                f"{_text(found) if found else 'no such parameter'}"
            )
    lacking = [name for name in biases if name not in built]
    strange = [name for name in built if not (biases and name.endswith(".bias"))]
    if lacking or strange:
        what = f"lacks {lacking[0]}" if lacking else f"has {strange[0]}, which the old model lacks"
        raise UserError(f"a {type(new).__name__} of the new shape {what}")


@dataclass(frozen=True)
class Room:
    """What plain classes hold of a model made narrower.

    `heads`: how many heads (kv groups, or query heads of each) may stay; `fixed`: kinds of units that cannot be fewer.
    """

    heads: tuple[int, ...]
    fixed: frozenset[str]

    @classmethod
    def of(cls, model: PreTrainedModel, config: Any, roles: Roles, kinds: Sequence[str]) -> Room:
        """Tried out on the configuration class, and on an empty model."""
        shapes = {name: one.shape for name, one in model.named_parameters()}
        heads: tuple[int, ...] = ()
        fixed: set[str] = set()
        for kind in kinds:
            units = find_units(roles, [kind])
            most = max((one.size for one in units), default=1)
            left = [most - 1] if kind not in (KV_GROUP, QUERY_HEAD) else range(1, most)
            taken = [one for one in left if _accepted_as(model, config, units[:1], shapes, one)]
            if taken and holds(model, config, _leaving(units, shapes, taken[-1])):
                heads = tuple(taken) if kind in (KV_GROUP, QUERY_HEAD) else heads
            elif units:
                fixed.add(kind)
        return cls(heads, frozenset(fixed))


def _leaving(units: Sequence[Units], shapes: dict[str, torch.Size], left: int) -> Slicing:
    """The edit after which `left` units of each stratum stay."""
    removed = {(one.layer, one.kind): one.first(one.count - left * one.strata) for one in units}
    return Slicing(units, shapes, removed)


def _accepted_as(
    model: PreTrainedModel, config: Any, units: Sequence[Units], shapes: dict[str, torch.Size], left: int
) -> bool:
    try:
        narrow_config(model, config, _leaving(units, shapes, left))
    except UserError:
        return False
    return True


def holds(model: PreTrainedModel, config: Any, slicing: Slicing) -> bool:
    """Whether a plain class holds what an edit leaves."""
    try:
        check_shapes(build_skeleton(narrow_config(model, config, slicing), torch.float32), slicing)
    except (UserError, ValueError, StrictDataclassError):
        return False
    return True


def _text(shape: torch.Size) -> str:
    return " x ".join(map(str, shape))
