"""A model without its weights, and the way a checkpoint's tensors find their place in it.

This is the one file that calls transformers' loader below `from_pretrained`: the renaming and
fusing of checkpoint tensors (per-expert matrices on disk, one 3-D parameter in memory) is done by
the library's own rules, a part of the model at a time.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers import core_model_loading as loading
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.auto import modeling_auto as auto

from llmprune.checkpoint.modeling_pruned import rebuild
from llmprune.checkpoint.remote import trusted
from llmprune.checkpoint.source import Checkpoint
from llmprune.types import RunError, UserError

CAUSAL, MASKED = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
# Types with a class for causal language modelling that is half of something else: these, and a few that no
# mapping of transformers tells apart.
HALVES = {
    *auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    *auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    *auto.MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES,
    *("moshi", "trocr", "gemma4_assistant", "gemma4_unified_assistant"),
}
# Types without a mapping for masked language models whose tokens see each other all the same.
UNORDERED = {*MASKED, "bert-generation", "xlnet"}


def load_config(folder: str, *, trust_remote_code: bool = False) -> Any:
    """Read and check a model's configuration; raises UserError for what cannot be pruned."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted(folder, trust_remote_code))
    except (ValueError, OSError, KeyError, TypeError, StrictDataclassError) as error:
        text = str(error).strip()
        if "trust_remote_code" in text:
            raise UserError(
                f"{folder} brings its own modelling code, which would run on this machine; "
                "read it, then pass --trust-remote-code"
            ) from error
        raise UserError(f"the configuration of {folder} cannot be read: {' '.join(text.split())}") from error
    check_config(config, folder)
    return config


# Models that go through their layers in cycles.
LOOPED = {"hrm_text"}


def check_config(config: Any, where: str) -> None:
    """Refuse what is no plain decoder-only language model, and quantized checkpoints; raises UserError."""
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise UserError(
            f"{where} is quantized ({method}); pruning needs plain weights. Use the original checkpoint, or "
            "dequantize it: load it with transformers, model.dequantize(), model.save_pretrained(NEW_FOLDER)"
        )
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    architectures = getattr(config, "architectures", None) or []
    kind = config.model_type
    if config.is_encoder_decoder:
        raise UserError(f"{where} is an encoder-decoder model ({kind}); llmprune prunes decoder-only models")
    if not remote and kind not in CAUSAL:
        raise UserError(f"{where} is a {kind!r} model, which transformers has no causal language model class for")
    headless = architectures and not any(name in _causal_names(kind) for name in architectures)
    if kind in HALVES:
        raise UserError(
            f"{where} is a part of an encoder-decoder, speech or drafting model ({kind}); llmprune prunes "
            "decoder-only language models, which stand alone"
        )
    if kind in LOOPED:
        raise UserError(
            f"{where} is a {kind!r} model, whose layers run several times in a forward pass: llmprune goes through layers once"
        )
    if getattr(config.get_text_config(), "cross_attention_layers", None):
        raise UserError(
            f"{where} is a {kind!r} model, some of whose layers run only where there are pictures: llmprune reads text"
        )
    if kind in UNORDERED and not getattr(config, "is_decoder", False):
        raise UserError(f"{where} is an encoder-only model ({kind}); llmprune prunes decoder-only language models")
    if not remote and headless and any("MaskedLM" in name or "Classification" in name for name in architectures):
        raise UserError(f"{where} holds a {architectures[0]}, not a causal language model")


def _causal_names(kind: str) -> tuple[str, ...]:
    names = CAUSAL.get(kind, ())
    return (names,) if isinstance(names, str) else tuple(names)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """While active, new parameters hold no memory; buffers (rotary tables) are real.

    transformers itself builds on the meta device and fills the buffers afterwards; doing it this way
    round needs no knowledge of which buffers a model computes.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def build_skeleton(
    config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False, experts_one_by_one: bool = True
) -> PreTrainedModel:
    """The model of `config` with parameters on the meta device, ready for inference.

    `experts_one_by_one`: use the library's eager implementation of experts, so that every product is seen.
    """
    trust = trusted(config.name_or_path, trust_remote_code)
    with _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust)
        if hasattr(config, "pruned_layers") and "auto_map" not in vars(config):
            # cut in memory, so its class does not know how to rebuild itself
            rebuild(model, config.pruned_path, config.pruned_layers, getattr(config, "pruned_shapes", {}))
    if experts_one_by_one:
        _set_experts_implementation(model, dict.fromkeys(_expert_configs(model), "eager"))
    return model.eval().requires_grad_(False)


def load_model(
    folder: Path, *, dtype: torch.dtype | str = "auto", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model of a folder with its weights, and what transformers says of the loading."""
    with quiet_loader():
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=trusted(folder, trust_remote_code), output_loading_info=True
        )
    return model, info


def rebuild_layers(
    model: PreTrainedModel, path: str, entries: list[dict[str, Any]], shapes: dict[str, list[int]] | None = None
) -> None:
    """Change the layers of a model without weights as `modeling_pruned` will when the checkpoint is loaded."""
    with _parameters_on_meta():
        rebuild(model, path, entries, shapes or {})


@contextlib.contextmanager
def run_experts_one_by_one(model: PreTrainedModel) -> Iterator[None]:
    """While active, fused experts use their eager implementation where the class offers a choice."""
    before = _expert_configs(model)
    _set_experts_implementation(model, dict.fromkeys(before, "eager"))
    try:
        yield
    finally:
        _set_experts_implementation(model, before)


def _expert_configs(model: PreTrainedModel) -> dict[int, Any]:
    return {id(one): one._experts_implementation for one in _configs(model) if hasattr(one, "_experts_implementation")}


def _set_experts_implementation(model: PreTrainedModel, wanted: dict[int, Any]) -> None:
    for config in _configs(model):
        if id(config) in wanted:
            config._experts_implementation = wanted[id(config)]


def _configs(model: PreTrainedModel) -> Iterator[Any]:
    return (module.config for module in model.modules() if hasattr(module, "config"))


@dataclass
class Group:
    """Checkpoint tensors that load together: one to one, or many into a converted parameter."""

    parameter: str
    keys: list[str] = field(default_factory=list)
    converted: bool = False


class Routing:
    """Which checkpoint tensor feeds which parameter of the model, and the way back for saving."""

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
        self._model = model
        self._checkpoint = checkpoint
        self._transforms = get_model_conversion_mapping(model)
        renamings = [one for one in self._transforms if isinstance(one, loading.WeightRenaming)]
        converters = [one for one in self._transforms if isinstance(one, loading.WeightConverter)]
        names = dict(model.state_dict())
        self.groups: dict[str, Group] = {}
        self._siblings: dict[str, Group] = {}
        self.unused: list[str] = []
        for key in sorted(checkpoint.entries, key=loading.dot_natural_key):
            name, source = loading.rename_source_key(key, renamings, converters, model.base_model_prefix, names)
            if name not in names and key in names:
                name, source = key, None
            if name not in names:
                self.unused.append(key)
                continue
            group = self.groups.setdefault(name, Group(name))
            group.keys.append(key)
            group.converted |= source is not None
            if source is not None:
                # one tensor may feed several parameters, which are called like the first
                first, *others = next(one for one in converters if source in one.source_patterns).target_patterns
                self._siblings.update({name.replace(first, other): group for other in others})

    @property
    def feeds(self) -> dict[str, str]:
        """Which parameter every tensor of the checkpoint feeds, those apart that feed none."""
        return {key: name for name, group in self.groups.items() for key in group.keys}

    def group_of(self, parameter: str) -> Group:
        """The checkpoint tensors that feed a parameter."""
        return self.groups.get(parameter) or self._siblings[parameter]

    def keys_under(self, prefix: str) -> list[str]:
        """The checkpoint tensors whose parameters lie under a module path (`"model.layers.3."`)."""
        return [key for name, group in self.groups.items() if name.startswith(prefix) for key in group.keys]

    def load(self, keys: list[str], dtype: torch.dtype, device: torch.device, overlay: Checkpoint | None) -> None:
        """Materialise the parameters fed by `keys`; a tensor also in `overlay` is read from there."""
        state = {
            key: overlay.slice(key) if overlay is not None and key in overlay.entries else self._checkpoint.slice(key)
            for key in keys
        }
        config = LoadStateDictConfig(device_map={"": str(device)}, dtype=dtype, weight_mapping=self._transforms)
        with quiet_loader():
            info, _ = loading.convert_and_load_state_dict_in_model(self._model, state, config)
        if info.conversion_errors or info.mismatched_keys or info.error_msgs:
            detail = info.conversion_errors or info.mismatched_keys or info.error_msgs
            raise RunError(f"the checkpoint does not fit its configuration: {detail}")

    def missing(self) -> list[str]:
        """Parameters that no tensor of the checkpoint feeds, tied ones apart."""
        if any(len(one.target_patterns) > 1 for one in self._transforms if isinstance(one, loading.WeightConverter)):
            return []  # one tensor feeds several parameters: only loading will tell
        tied = set(self._model.all_tied_weights_keys)
        names = (name for name, _ in self._model.named_parameters())
        return [name for name in names if name not in self.groups and name not in tied]

    def misfits(self) -> list[str]:
        """Parameters whose tensor has another shape than the configuration says; converted ones show on loading."""
        state = self._model.state_dict()
        single = {name: group.keys[0] for name, group in self.groups.items() if not group.converted}
        return [name for name, key in single.items() if self._checkpoint.entries[key].shape != state[name].shape]

    def store(
        self, prefix: str, edit: Callable[[str, torch.Tensor], torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """The current parameters under a module path as checkpoint tensors: names and layout of the source.

        `edit(name, value)`: what is stored in place of a parameter's value; it may have another shape.
        """
        groups = [group for name, group in self.groups.items() if name.startswith(prefix)]
        state = {name: value for name, value in self._model.state_dict().items() if name.startswith(prefix)}
        state = {name: edit(name, value) for name, value in state.items()} if edit else state
        tensors = {key: state.pop(one.parameter) for one in groups if not one.converted for key in one.keys}
        keys = [key for one in groups if one.converted for key in one.keys]
        if keys:
            tensors.update(_match_names(loading.revert_weight_conversion(self._model, state), keys))
        return tensors


def _match_names(tensors: dict[str, torch.Tensor], keys: list[str]) -> dict[str, torch.Tensor]:
    """Give reverted tensors the names of the source, which may lack or add the base-model prefix."""
    found = {}
    for key in keys:
        same = (one for one in tensors if one == key or one.endswith("." + key) or key.endswith("." + one))
        name = next(same, None)
        if name is None:
            raise RunError(f"{key!r} of the checkpoint cannot be written back in its layout: the library lost it")
        found[key] = tensors[name]
    return found


@contextlib.contextmanager
def quiet_loader() -> Iterator[None]:
    """Silence the loader's progress bar and report: it sees a part of the model and calls the rest missing."""
    from transformers.utils import logging as library

    bars = library.is_progress_bar_enabled()
    library.disable_progress_bar()
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            library.enable_progress_bar()
