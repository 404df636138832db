"""The halves of a layer as functions of the residual stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llmprune.arch.stream import Half, Stream
from llmprune.engine.trunk import States, Trunk
from llmprune.types import UserError


def written(trunk: Trunk, index: int, batch: int, number: int, half: Half, state: torch.Tensor) -> torch.Tensor:
    """What a half adds to the stream."""
    layer = trunk.units[index].module
    args, kwargs = trunk.call(index, batch, state)
    kwargs = {name: one for name, one in kwargs.items() if name != "hidden_states"}
    output = layer.get_submodule(half.norm)(state)
    for name in half.modules:
        module = layer.get_submodule(name)
        output = module(output, *args[1:], **kwargs) if number == 0 else module(output)
        output = output[0] if isinstance(output, tuple) else output
    found: torch.Tensor = output
    return found


def check(trunk: Trunk, stream: Stream, index: int, states: States) -> None:
    """Whether the layer is norm, attention, sum, norm, MLP, sum, its norms plain ones; raises UserError."""
    state, layer = states[0], trunk.units[index].module
    try:
        expected = trunk.apply(index, 0, state)
        found = state
        for number, half in enumerate(stream.layers[index]):
            norm: Any = layer.get_submodule(half.norm)
            plain = (
                nn.functional.normalize(centred(stream, found).float(), dim=-1)
                * stream.hidden**0.5
                * norm.weight.float()
            )
            bias = getattr(norm, "bias", None)
            plain = plain if bias is None else plain + bias.float()
            if not torch.allclose(norm(found).float(), plain, rtol=0.05, atol=0.05 * float(plain.abs().max())):
                raise UserError(
                    f"{trunk.units[index].name}.{half.norm} is no plain norm, so its stream cannot be turned"
                )
            found = found + written(trunk, index, 0, number, half, found)
        same = torch.allclose(found, expected, rtol=0.01, atol=0.01 * float(expected.abs().max()))
    except (RuntimeError, TypeError, AttributeError):
        same = False
    if not same:
        raise UserError(
            f"{trunk.units[index].name} is not norm and attention, then norm and MLP, each added to the hidden state; "
            "slicegpt knows no other layers"
        )


def centred(stream: Stream, state: torch.Tensor) -> torch.Tensor:
    """The state without its mean, where the model's norms subtract that anyway."""
    return state - state.mean(-1, keepdim=True) if stream.centred else state


def projected(stream: Stream, state: torch.Tensor, basis_Dd: torch.Tensor) -> torch.Tensor:
    """The part of a state that lies in a subspace, whose basis is orthonormal."""
    basis_Dd = basis_Dd.to(state.device)
    return (centred(stream, state.double()) @ basis_Dd @ basis_Dd.T).to(state.dtype)
