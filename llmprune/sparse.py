"""Models that compute on packed 2:4 weights: `accelerate` a loaded one, `load` one from a folder."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from llmprune.checkpoint.output import save_tensors
from llmprune.checkpoint.skeleton import Routing, build_skeleton, load_config, load_model
from llmprune.checkpoint.source import Checkpoint, resolve
from llmprune.device import choose_device, choose_dtype
from llmprune.kernels import eligibility
from llmprune.kernels.linear24 import Packed24, SparseLinear24, join
from llmprune.kernels.sparse24 import why_not_24
from llmprune.types import UserError

# In a folder of its own: programs that read every safetensors file beside config.json must not find it.
PACKED = Path("sparse24") / "packed.safetensors"
# Layers beside each other that read one input: they share a product. That it is one is checked at every call.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


def survey(model: PreTrainedModel) -> dict[str, str | None]:
    """Every `nn.Linear` of a model by name: None if its weights are 2:4, else the reason why it stays dense."""
    tied = set(model.all_tied_weights_keys) | set(model.all_tied_weights_keys.values())
    found: dict[str, str | None] = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            shared = f"{name}.weight" in tied
            found[name] = "its weights are shared with the embedding" if shared else why_not_24(module.weight)
    return found


def accelerate(model: PreTrainedModel, *, prefill: bool = False) -> PreTrainedModel:
    """Swap, in place, the linear layers whose weights are truly 2:4 for packed ones; returns the model.

    Half of the weights and 2 bits for each kept one stay in memory: 0.5625 of the dense bytes in 16-bit. The
    weights are frozen; gradients still reach inputs and biases. q, k and v, and gate and up, compute as one product.
    `prefill` keeps what cuSPARSELt can take in its form as well, for many tokens at once: 1.125 of the dense bytes in
    all. Raises UserError if no layer is 2:4, or if `prefill` is asked for and there is no cuSPARSELt.
    """
    reason = eligibility.cusparselt(model.device) if prefill else None
    if reason is not None:
        raise UserError(f"prefill=True cannot be had here: {reason}")
    layers = survey(model)
    for name, reason in layers.items():
        if reason is None:
            model.set_submodule(name, SparseLinear24.from_linear(model.get_submodule(name)))  # type: ignore[arg-type]
    if None not in layers.values() and not _packed_layers(model):
        examples = "; ".join(f"{name}: {reason}" for name, reason in list(layers.items())[:2])
        raise UserError(f"no linear layer of the model is 2:4 ({examples}); prune it with --pattern 2:4")
    _join_siblings(model)
    if prefill:
        for module in model.modules():
            if isinstance(module, Packed24):
                module.compress()
    return model


def _join_siblings(model: PreTrainedModel) -> None:
    for module in model.modules():
        children = dict(module.named_children())
        for names in SIBLINGS:
            found = [one for name in names if isinstance(one := children.get(name), SparseLinear24)]
            same = {(one.in_features, one.values.dtype, one.values.device) for one in found}
            apart = {id(one.packed) for one in found}
            if len(found) > 1 and len(same) == 1 and len(apart) == len(found):
                join(found)


def save_packed(model: PreTrainedModel, folder: str | Path) -> Path:
    """Write the packed layers of an accelerated model beside the plain checkpoint that they came from.

    The plain checkpoint stays the portable form; the packed file makes `load(folder, sparse=True)` read less
    and never hold the dense matrices. Raises UserError if the folder holds other weights or none.
    """
    checkpoint = Checkpoint(resolve(str(folder)))
    layers = _packed_layers(model)
    if not layers:
        raise UserError("the model has no packed layers; call llmprune.accelerate(model) first")
    tensors = {}
    for name, layer in layers.items():
        stored = checkpoint.entries.get(f"{name}.weight")
        if stored is not None and not torch.equal(checkpoint.tensor(f"{name}.weight").to(layer.weight), layer.weight):
            raise UserError(f"{folder} holds other weights of {name} than the model; save the model there first")
        dtype = layer.values.dtype if stored is None else stored.dtype
        # rows of a joined matrix share their memory, which a file cannot
        tensors[f"{name}.values"] = layer.values.to("cpu", dtype, copy=True)
        tensors[f"{name}.metadata"] = layer.metadata.to("cpu", copy=True)
    path = checkpoint.folder / PACKED
    path.parent.mkdir(exist_ok=True)
    save_tensors(tensors, path, {"format": "2:4, version 1", "checkpoint": checkpoint.fingerprint()})
    return path


def load(
    folder: str | Path,
    *,
    sparse: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a model for use; with `sparse`, its 2:4 layers compute on packed weights.

    `folder`: a folder or a Hub id. `dtype`: "auto" is float32 on CPU, the checkpoint's own elsewhere. Reads the
    packed file of `save_packed` if there is one, else packs what it has loaded. Raises UserError, also if
    `sparse` is asked for and no layer is 2:4.
    """
    path = resolve(str(folder))
    config = load_config(str(path), trust_remote_code=trust_remote_code)
    place = choose_device(device)
    wanted = choose_dtype(dtype, config, place)
    if sparse and (path / PACKED).is_file():
        return _load_packed(path, config, wanted, place, trust_remote_code)
    model = load_model(path, dtype=wanted, trust_remote_code=trust_remote_code)[0].to(place).eval()
    return accelerate(model) if sparse else model


def _load_packed(
    folder: Path, config: object, dtype: torch.dtype, device: torch.device, trust_remote_code: bool
) -> PreTrainedModel:
    """Everything but the packed layers from the checkpoint, those from the packed file."""
    checkpoint = Checkpoint(folder)
    with safe_open(folder / PACKED, "pt") as stored:
        if stored.metadata().get("checkpoint") != checkpoint.fingerprint():
            raise UserError(f"{folder / PACKED} was made from other weights; delete it, or make it anew")
        names = sorted({key.rpartition(".")[0] for key in stored.keys()})  # noqa: SIM118 (not iterable)
        model = build_skeleton(config, dtype, trust_remote_code=trust_remote_code, experts_one_by_one=False)
        routing = Routing(model, checkpoint)
        skip = {f"{name}.weight" for name in names}
        keys = [key for name, group in routing.groups.items() if name not in skip for key in group.keys]
        routing.load(keys, dtype, device, None)
        model.tie_weights()
        for name in names:
            linear = model.get_submodule(name)
            values_OV = stored.get_tensor(f"{name}.values").to(device, dtype)
            metadata_OB = stored.get_tensor(f"{name}.metadata").to(device)
            packed = Packed24(values_OV, metadata_OB)
            model.set_submodule(name, SparseLinear24(packed, 0, len(values_OV), linear.bias))  # type: ignore[arg-type]
    _join_siblings(model)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.to(device).eval()


def _packed_layers(model: nn.Module) -> dict[str, SparseLinear24]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear24)}
