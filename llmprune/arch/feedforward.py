"""The MLP of a decoder layer as a formula: down(act(gate x) * up x), or down(act(up x))."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmprune.arch.discover import expert_blocks
from llmprune.arch.sublayers import MLP, halves
from llmprune.types import UserError

ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")


@dataclass(frozen=True)
class Feedforward:
    """Paths of its modules in the layer, and its activation. `gate` is None where it has none, or where `up` is both.

    `joined`: `up` puts out the gate's outputs first, then those of up.
    """

    up: str
    gate: str | None
    joined: bool
    down: str
    activation: Callable[[torch.Tensor], torch.Tensor]

    def inner(self, gate_TC: torch.Tensor | None, up_TC: torch.Tensor) -> torch.Tensor:
        """What down is fed, from what gate and up put out, tokens x channels."""
        return self.activation(up_TC) if gate_TC is None else self.activation(gate_TC) * up_TC


def feedforward(layer: nn.Module) -> Feedforward | None:
    """The MLP of a layer; None for one of experts, or one that is no such formula."""
    try:
        writers = halves(layer)[MLP].writers
    except UserError:
        return None
    if len(writers) != 1 or any(True for _ in expert_blocks(layer)):
        return None
    down = writers[0]
    owner = down.rpartition(".")[0]
    block: Any = layer.get_submodule(owner)
    activation = next((found for name in ACTIVATIONS if callable(found := getattr(block, name, None))), None)
    linear = {
        f"{owner}.{name}".removeprefix("."): one
        for name, one in block.named_children()
        if isinstance(getattr(one, "weight", None), nn.Parameter) and one.weight.dim() == 2
    }
    others = [path for path in linear if path != down]
    gates = [path for path in others if "gate" in path.rpartition(".")[2]]
    if activation is None or not 1 <= len(others) <= 2:
        return None
    if len(others) == 2:
        if len(gates) != 1:
            return None
        up = next(path for path in others if path not in gates)
        return Feedforward(up, gates[0], False, down, activation)
    return Feedforward(others[0], None, bool(gates), down, activation)
