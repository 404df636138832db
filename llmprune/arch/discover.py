"""Find the decoder layers and the prunable matrices of any model, from its modules alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmprune.types import MatrixSpec, UserError

ROUTER = "router: decides which expert sees a token"
NOT_A_MATRIX = "not a matrix product"


@dataclass
class Unit:
    """A module that is calibrated and pruned as one step: a decoder layer, or the head.

    `borrowed`: its parameters that are those of another place (tied weights), with their names there.
    """

    name: str
    module: nn.Module
    matrices: list[MatrixSpec] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)
    borrowed: dict[str, str] = field(default_factory=dict)

    @property
    def prefix(self) -> str:
        return self.name + "."


# What a text model mainly reads, by the name that transformers gives it.
TOKENS = ("input_ids", "inputs_embeds")


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers: the heaviest ModuleList of the decoder that is no list of experts.

    Towers for pictures and sound, which read something else than token ids, do not count. Raises UserError if the
    model has none.
    """
    decoder = model.get_decoder() or model
    towers = [one for one in decoder.modules() if one is not decoder and _is_tower(one, model.config.get_text_config())]
    # the decoder may be a sub-module of the model: names are wanted from the root
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and "expert" not in name.lower()
    ]
    inside = {id(module) for module in decoder.modules()} - {id(module) for one in towers for module in one.modules()}
    # some classes call their head "decoder"
    found = [(name, module) for name, module in lists if id(module) in inside] or lists
    several = [one for one in found if len(one[1]) > 1] or found
    if not several:
        raise UserError(f"no list of decoder layers found in {type(model).__name__}")
    return max(several, key=lambda one: sum(p.numel() for p in one[1].parameters()))


def _is_tower(module: nn.Module, text: PreTrainedConfig) -> bool:
    """Whether a module is a model within the model that mainly reads something else than token ids.

    Those for sound may call their input by that name too: then no part of them has the configuration of the text.
    """
    if not isinstance(module, PreTrainedModel):
        return False
    models = [one for one in module.modules() if isinstance(one, PreTrainedModel)]
    return module.main_input_name not in TOKENS or all(type(one.config) is not type(text) for one in models)


def find_units(model: PreTrainedModel, *, head: bool) -> list[Unit]:
    """Every decoder layer, and the head if asked for, with its matrices and what is left alone in it."""
    path, layers = decoder_layers(model)
    tied = model.all_tied_weights_keys
    units = [_unit(f"{path}.{index}", layer, tied) for index, layer in enumerate(layers)]
    if head:
        module = model.get_output_embeddings()
        name = next((name for name, one in model.named_modules() if one is module), None)
        if module is None or name is None:
            raise UserError(f"{type(model).__name__} has no output head to prune")
        units.append(_unit(name, module, tied))
    return units


def expert_blocks(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules in which each token takes its own way: owners of 3-D parameters, or of a list of experts."""
    for name, module in layer.named_modules():
        fused = any(holds_experts(module, one) for one in module.parameters(recurse=False))
        listed = any(
            isinstance(child, nn.ModuleList) and "expert" in child_name.lower()
            for child_name, child in module.named_children()
        )
        if fused or listed:
            yield name, module


def holds_experts(owner: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether a parameter is several matrices, one an expert."""
    return parameter.dim() == 3 and min(parameter.shape[1:]) > 1 and not _is_convolution(owner)


def _unit(name: str, module: nn.Module, tied: dict[str, str]) -> Unit:
    unit = Unit(name, module)
    routers = _routers(module)
    for path, owner in module.named_modules(prefix=name):
        for short, parameter in owner.named_parameters(recurse=False):
            full = f"{path}.{short}"
            if full in tied:
                unit.borrowed[full] = tied[full]
            if parameter.dim() < 2:
                continue
            if full in tied:
                unit.left_alone[full] = f"tied: it is {tied[full]}"
            elif id(owner) in routers:
                unit.left_alone[full] = ROUTER
            elif isinstance(owner, nn.Linear) and short == "weight":
                outputs, inputs = parameter.shape
                unit.matrices.append(MatrixSpec(full, None, outputs, inputs, False))
            elif isinstance(owner, Conv1D) and short == "weight":
                inputs, outputs = parameter.shape
                unit.matrices.append(MatrixSpec(full, None, outputs, inputs, True))
            elif holds_experts(owner, parameter):
                unit.matrices.extend(_fused_experts(full, owner, parameter))
            else:
                unit.left_alone[full] = f"{NOT_A_MATRIX} ({type(owner).__name__})"
    return unit


def _fused_experts(name: str, owner: nn.Module, parameter: nn.Parameter) -> Iterator[MatrixSpec]:
    """One matrix per expert. Where the class does not say how it stores them, `transposed` is left open."""
    transposed = getattr(owner, "is_transposed", None)
    experts, rows, columns = parameter.shape
    outputs, inputs = (columns, rows) if transposed else (rows, columns)
    for index in range(experts):
        yield MatrixSpec(name, index, outputs, inputs, transposed)


def _routers(layer: nn.Module) -> set[int]:
    """Modules that score experts: beside an expert block, with as many outputs as experts, or a single gate."""
    routers = set()
    for path, block in expert_blocks(layer):
        parent = layer.get_submodule(path.rpartition(".")[0]) if path else layer
        count = expert_count(block)
        # a block that owns its experts as a list holds its router itself
        for holder in (parent, block):
            for name, module in holder.named_modules():
                weight = getattr(module, "weight", None)
                if "expert" in name.lower().rpartition(".")[0] or not isinstance(weight, nn.Parameter):
                    continue
                if weight.dim() == 2 and weight.shape[0] in (count, 1):
                    routers.add(id(module))
    return routers


def expert_count(block: nn.Module) -> int:
    """How many experts a block of `expert_blocks` holds."""
    for parameter in block.parameters(recurse=False):
        if holds_experts(block, parameter):
            return parameter.shape[0]
    return next(len(child) for child in block.children() if isinstance(child, nn.ModuleList))


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def parameter_count(model: PreTrainedModel) -> int:
    """How many parameters a model has, tied ones counted once."""
    tied = model.all_tied_weights_keys
    return sum(one.numel() for name, one in model.named_parameters() if name not in tied)
