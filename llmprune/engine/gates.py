"""Factors on what units hand to the matrix that they write through: 1 leaves the model as it is, 0 takes a unit out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from llmprune.arch.units import Units
from llmprune.checkpoint.slicing import Place
from llmprune.types import UserError


@contextlib.contextmanager
def gated(model: nn.Module, units: Iterable[Units], gates: Mapping[Place, torch.Tensor]) -> Iterator[None]:
    """While active, the units of each place are multiplied by its gate: U long, or B x U for B sequences.

    Raises UserError for fused experts, whose matrices are no modules.
    """
    with contextlib.ExitStack() as stack:
        for one in units:
            gate = gates[(one.layer, one.kind)]
            stack.callback(_writer(model, one).register_forward_pre_hook(_multiply(one, gate)).remove)
        yield


def check_gates(model: nn.Module, units: Iterable[Units]) -> None:
    """Whether all units can be gated; raises UserError."""
    for one in units:
        _writer(model, one)


def _writer(model: nn.Module, units: Units) -> nn.Module:
    assert units.writer is not None
    if units.stacked:
        raise UserError("this method switches units of modules on and off, which fused experts are not; use another")
    return model.get_submodule(units.writer.name.removesuffix(".weight"))


def _multiply(units: Units, gate: torch.Tensor) -> Any:
    assert units.columns_UN is not None
    unit_I = torch.empty(units.columns_UN.numel(), dtype=torch.int64)
    unit_I[units.columns_UN.flatten()] = torch.arange(units.count).repeat_interleave(units.columns_UN.shape[1])

    def before(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x = args[0]
        factor = gate.to(x.dtype)[..., unit_I.to(gate.device)]
        # OPT joins sequences and tokens before its MLP
        factor = factor[:, None] if factor.dim() == 2 else factor
        if factor.dim() == 3 and x.dim() == 2:
            factor = factor.expand(-1, len(x) // len(factor), -1).reshape(x.shape)
        return (x * factor, *args[1:])

    return before
