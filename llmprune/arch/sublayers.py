"""The two halves of a decoder layer, attention and MLP, and the modules through which each writes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from llmprune.arch.discover import expert_blocks
from llmprune.types import UserError

ATTENTION, MLP = "attention", "mlp"
HALVES = (ATTENTION, MLP)
# The last matrix of a half: what it puts out is added to the residual stream.
OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "wo", "down_proj", "dense_4h_to_h", "fc2", "w2", "fc_out")
FUSED_OUTPUTS = ("down_proj", "w2")


@dataclass(frozen=True)
class Half:
    """Modules (by path in the layer) whose outputs make up a half, and the parameters that zero them."""

    writers: tuple[str, ...]
    parameters: tuple[str, ...]

    def modules(self, layer: nn.Module) -> list[nn.Module]:
        return [layer.get_submodule(path) for path in self.writers]


def halves(layer: nn.Module) -> dict[str, Half]:
    """Attention and MLP of a layer; raises UserError where they cannot be told apart.

    A module is silenced by zeros in its weight and bias, an expert block by zeros in the second matrix
    and bias of every expert.
    """
    blocks = dict(expert_blocks(layer))
    found: dict[str, list[str]] = {ATTENTION: [], MLP: []}
    for path, module in layer.named_modules():
        head, _, last = path.rpartition(".")
        inside_block = any(path.startswith(f"{block}.") for block in blocks if block)
        if path in blocks:
            found[MLP].append(path)
        elif last in OUTPUTS and not inside_block and _is_matrix(module):
            found[ATTENTION if attends(head) else MLP].append(path)
    if not all(found.values()):
        lacking = next(half for half, paths in found.items() if not paths)
        raise UserError(f"the {lacking} of a {type(layer).__name__} is not found, so its layers cannot be halved")
    return {half: Half(tuple(paths), _parameters(layer, paths, blocks)) for half, paths in found.items()}


def writes_to_stream(name: str) -> bool:
    """Whether a matrix is the last of its half, by its name."""
    return name.partition("[")[0].removesuffix(".weight").rpartition(".")[2] in OUTPUTS


def attends(path: str) -> bool:
    """Whether a module, by its path in a decoder layer, belongs to the attention."""
    first = path.partition(".")[0].lower()
    return "attn" in first or "attention" in first or first in ("mixer", "conv", "temporal_block")


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 2


def _parameters(layer: nn.Module, paths: list[str], blocks: dict[str, nn.Module]) -> tuple[str, ...]:
    names: list[str] = []
    for path in paths:
        module = layer.get_submodule(path)
        for short, _ in module.named_parameters():
            if path not in blocks or any(part.removesuffix("_bias") in FUSED_OUTPUTS for part in short.split(".")):
                names.append(f"{path}.{short}")
    return tuple(names)
