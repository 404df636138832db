"""Factors on what units hand to the matrix that they write through: 1 leaves the model as it is, 0 takes a unit out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from llmprune.arch.units import Units
from llmprune.checkpoint.slicing import Place


@contextlib.contextmanager
def gated(model: nn.Module, units: Iterable[Units], gates: Mapping[Place, torch.Tensor]) -> Iterator[None]:
    """While active, the units of each place are multiplied by its gate: U long, or B x U for B sequences.

    Units of fused experts take one gate for all sequences.
    """
    with contextlib.ExitStack() as stack:
        for one in units:
            assert one.writer is not None
            gate = gates[(one.layer, one.kind)]
            owner, _, short = one.writer.name.rpartition(".")
            module = model.get_submodule(owner)
            if one.stacked:
                # these matrices are no modules, but a factor on an input is one on the column that reads it
                matrix = module._parameters[short]
                assert matrix is not None and gate.numel() == one.count
                stack.callback(module._parameters.__setitem__, short, matrix)
                factor = gate.view(one.strata, 1, one.size).to(matrix.dtype)
                module._parameters[short] = matrix * factor  # type: ignore[assignment]
            else:
                stack.callback(module.register_forward_pre_hook(_multiply(one, gate)).remove)
        yield


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
