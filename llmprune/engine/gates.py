"""Factors on what units hand to the matrix that they write through: 1 leaves the model as it is, 0 takes a unit out.

Their gradients need the model and the activations of one batch in all layers; none of weights is made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from llmprune.arch.units import Units
from llmprune.checkpoint.slicing import Place
from llmprune.engine.trunk import Trunk, token_losses
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


def squared_gradients(
    trunk: Trunk,
    units: Mapping[Place, Units],
    labels: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> dict[Place, torch.Tensor]:
    """The sum over sequences of (dL / dm)^2 by place, U long in float64, m being the gate on a unit.

    L is the mean negative log likelihood, over the tokens of a sequence, of the next token; with `labels(logits, ids)`,
    of the tokens that it answers in place of `ids`. All layers must be loaded.
    """
    total = {place: torch.zeros(one.count, dtype=torch.float64) for place, one in units.items()}
    for batch in trunk.batches:
        ids = batch["input_ids"]
        size, device = len(ids), ids.device
        gates = {place: torch.ones(size, one.count, device=device, requires_grad=True) for place, one in units.items()}
        with torch.enable_grad(), gated(trunk.model, units.values(), gates):
            logits = trunk.model(**batch, use_cache=False).logits
            wanted = ids if labels is None else labels(logits.detach(), ids)
            losses = token_losses(logits, wanted).mean(1).sum()
        gradients = torch.autograd.grad(losses, list(gates.values()))
        for place, gradient in zip(gates, gradients, strict=True):
            total[place] += gradient.double().square().sum(0).cpu()
    return total


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
