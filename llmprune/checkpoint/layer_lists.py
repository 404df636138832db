"""A configuration after layers or experts have been left out: every key that counts or lists them.

Whether the result says what it should is not decided here: `surgery.Cutter` compares every kept layer
with the layer that the new configuration builds.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from llmprune.types import UserError

# Keys that list layers by their index.
INDEX_LISTS = (
    *("mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices", "moe_layer_indices"),
    "hybrid_layer_ids",
)
# Keys that say how many of the first layers are of another kind.
LEADING = ("first_k_dense_replace", "max_window_layers")
# Keys that hold the number of routed experts, and of those a token goes to.
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "moe_top_k", "top_k_experts", "moe_topk", "moe_k")


def edit_config(
    config: Any, kept: Sequence[int], depth: int, sparse: Sequence[bool], experts: tuple[int, int] | None
) -> Any:
    """A copy of `config` (a `PreTrainedConfig`) for the layers `kept` of `depth`.

    `sparse`: which of the old layers have experts. `experts`: their number before and after, if it
    changes. Raises UserError for what no configuration can say.
    """
    edited = copy.deepcopy(config)
    text = edited.get_text_config()
    if experts is not None:
        _count_experts(text, *experts)
    if len(kept) == depth:
        return edited
    if not kept:
        raise UserError("at least one layer must stay")
    refuse_shared_layers(text)
    kinds = getattr(text, "layer_types", None) or []
    attends = ["attention" in kind and kind != "linear_attention" for kind in kinds]
    if any(attends) and not any(attends[index] for index in kept):
        raise UserError(
            f"no layer with full attention would stay; {text.model_type} models cannot generate without one. "
            f"Keep one of {[index for index, one in enumerate(attends) if one]}"
        )
    place = {index: number for number, index in enumerate(kept)}
    own = text.to_dict()["per_layer_config"] if getattr(text, "is_heterogeneous", False) else None
    if own is not None:
        text.per_layer_config = None  # until the rest is as it will be: the library checks the one against the other
    text.num_hidden_layers = len(kept)
    for key, value in list(vars(text).items()):
        if key in INDEX_LISTS and isinstance(value, list):
            setattr(text, key, [place[index] for index in value if index in place])
        elif key in LEADING and isinstance(value, int):
            setattr(text, key, sum(index < value for index in kept))
        elif isinstance(value, list | tuple) and len(value) == depth and _counts_layers(key):
            _set(text, key, [value[index] for index in kept])
    if own is not None:
        text.per_layer_config = {place[int(index)]: one for index, one in own.items() if int(index) in place}
    if getattr(text, "decoder_sparse_step", 1) != 1:
        # a period cannot survive, but the list of dense layers says the same
        text.mlp_only_layers = [place[index] for index in kept if not sparse[index]]
        text.decoder_sparse_step = 1
    if getattr(text, "attention_types", None) is not None and getattr(text, "attention_layers", None):
        text.attention_types = [[list(text.attention_layers), 1]]
    return edited


def refuse_shared_layers(config: Any) -> None:
    """Raise UserError if layers read what earlier layers provide: none of them then is a function of its input."""
    text = config.get_text_config()
    shared = getattr(text, "num_kv_shared_layers", 0)
    if shared:
        raise UserError(
            f"the last {shared} layers of this {text.model_type} model (num_kv_shared_layers) read keys and values that "
            "earlier layers provide, so its layers cannot be taken apart"
        )


def top_k(config: Any) -> int:
    """How many experts a token goes to; 1 if the configuration has no known key for it."""
    text = config.get_text_config()
    return next((value for key in TOP_K if isinstance(value := getattr(text, key, None), int)), 1)


def expert_keys(text: Any, count: int) -> list[str]:
    """The keys that hold the number of routed experts; raises UserError if none is known."""
    names = [key for key in EXPERT_COUNTS if getattr(text, key, None) == count]
    if not names:
        raise UserError(f"{type(text).__name__} has no known key for its number of experts")
    return names


def expert_groups(config: Any) -> int:
    """In how many groups of equal size the router sees the experts (group-limited routing)."""
    return getattr(config.get_text_config(), "n_group", None) or 1


def _counts_layers(key: str) -> bool:
    """Whether a list as long as the model may have one entry a layer: token ids and class names do not."""
    return not key.endswith(("token_id", "token_ids", "architectures", "_keys")) and key not in INDEX_LISTS


def _set(config: Any, key: str, value: list[Any]) -> None:
    try:
        setattr(config, key, value)
    except AttributeError as error:
        raise UserError(f"{type(config).__name__}.{key} cannot be set: its layers cannot be dropped") from error


def _count_experts(text: Any, before: int, after: int) -> None:
    if after < top_k(text):
        raise UserError(
            f"{after} of {before} experts would stay, but the router sends every token to {top_k(text)}; drop fewer"
        )
    groups = expert_groups(text)
    if after % groups or after // groups < min(2, before // groups):
        raise UserError(f"{after} experts cannot be split into the router's {groups} groups of at least 2; drop others")
    if groups > 1 and after // groups * (getattr(text, "topk_group", None) or groups) < top_k(text):
        raise UserError(f"{after} experts in {groups} groups leave fewer than top-k choices in the groups of a token")
    for key in expert_keys(text, before):
        setattr(text, key, after)


def layer_of_keys(feeds: dict[str, str], prefixes: list[str], keys: list[str]) -> dict[str, int]:
    """Which layer every tensor of the checkpoint belongs to: by what it feeds, or else by its name."""
    found: dict[str, int] = {}
    starts: dict[str, int] = {}
    for key, name in feeds.items():
        for index, prefix in enumerate(prefixes):
            if name.startswith(prefix):
                found[key] = index
                parts = key.split(".")
                number = next((place for place, part in enumerate(parts) if part == str(index)), None)
                if number is not None:
                    starts[".".join(parts[: number + 1]) + "."] = index
    unused = (key for key in keys if key not in feeds)
    return found | {key: index for key in unused for start, index in starts.items() if key.startswith(start)}
