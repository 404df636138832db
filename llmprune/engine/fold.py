"""A linear map after a layer, folded into the matrices that its MLP writes with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmprune.arch.discover import Unit
from llmprune.arch.sublayers import MLP, halves
from llmprune.engine.search import run_without
from llmprune.engine.trunk import States, Trunk
from llmprune.types import RunError, UserError


@dataclass(frozen=True)
class Fit:
    """Sums for the least squares problem min ||M A - (M + E)||^2 over all tokens.

    M: what the MLP of a layer adds to the residual stream; E: by how much the layer's output misses its target.
    """

    gram_DD: torch.Tensor
    cross_DD: torch.Tensor
    error_before: float

    def solve(self, damping: float) -> tuple[torch.Tensor, float]:
        """The map A (width x width, float64) and the squared error that it leaves.

        Ridge regression towards the identity: A = I + (M'M + a I)^-1 M'E with a = damping * mean(diag M'M).
        So A = I, plain dropping, is what infinite damping gives, and the error never exceeds it.
        """
        ridge = damping * float(self.gram_DD.diagonal().mean())
        damped_DD = self.gram_DD + ridge * torch.eye(len(self.gram_DD), dtype=torch.float64, device=self.gram_DD.device)
        factor_DD, info = torch.linalg.cholesky_ex(damped_DD)
        if int(info):
            raise RunError(f"the MLP outputs span too few directions for damping {damping}; give more text or damping")
        change_DD = torch.cholesky_solve(self.cross_DD, factor_DD)
        # ||M C - E||^2 = tr(C' M'M C) - 2 tr(C' M'E) + ||E||^2
        gained = 2 * (change_DD * self.cross_DD).sum() - (change_DD * (self.gram_DD @ change_DD)).sum()
        map_DD = change_DD + torch.eye(len(change_DD), dtype=torch.float64, device=change_DD.device)
        return map_DD, self.error_before - float(gained)


def measure(trunk: Trunk, index: int, last: int, target: Callable[[States, States], States]) -> Fit:
    """The least squares problem of mapping the output of layer `index` to a target.

    `target(before, after)` is given the states that leave `index` and `last`. Holds one layer, the activations and
    two width x width matrices in float64.
    """
    states = trunk.enter()
    for number in range(index):
        with trunk.loaded(number):
            states = trunk.run(number, states)
    with trunk.loaded(index):
        _check_linear(trunk, index, states)
        without = run_without(trunk, index, states, {(index, MLP)})
        before = trunk.run(index, states)
    after = before
    for number in range(index + 1, last + 1):
        with trunk.loaded(number):
            after = trunk.run(number, after)
    width = before[0].shape[-1]
    gram_DD = torch.zeros(width, width, dtype=torch.float64, device=before[0].device)
    cross_DD = torch.zeros_like(gram_DD)
    error = 0.0
    for base, here, wanted in zip(without, before, target(before, after), strict=True):
        mlp_TD = (here.double() - base.double()).flatten(0, 1)
        error_TD = (wanted.double() - here.double()).flatten(0, 1)
        gram_DD += mlp_TD.T @ mlp_TD
        cross_DD += mlp_TD.T @ error_TD
        error += float(error_TD.square().sum())
    return Fit(gram_DD, cross_DD, error)


def folded(trunk: Trunk, index: int, map_DD: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parameters of layer `index` after its MLP's output has been multiplied by a map, by full name."""
    unit = trunk.units[index]
    found = {}
    with trunk.loaded(index):
        for short in halves(unit.module)[MLP].parameters:
            value = unit.module.get_parameter(short)
            found[unit.prefix + short] = _times(value.double(), map_DD, output_axis(unit, short, len(map_DD)))
    return {name: value.float() for name, value in found.items()}


def _times(value: torch.Tensor, map_DD: torch.Tensor, axis: int) -> torch.Tensor:
    return (value.movedim(axis, -1) @ map_DD).movedim(-1, axis).contiguous()


def output_axis(unit: Unit, short: str, width: int) -> int:
    """Along which axis of a parameter the outputs lie."""
    shape = unit.module.get_parameter(short).shape
    if short.endswith("bias") or len(shape) == 1:
        return -1
    transposed = next(spec.transposed for spec in unit.matrices if spec.parameter == unit.prefix + short)
    if transposed is None and shape[-1] == shape[-2]:
        raise UserError(f"{unit.prefix}{short}: which axis holds the outputs cannot be told from its shape")
    if transposed is None:
        transposed = shape[-1] == width
    return -1 if transposed else -2


def _check_linear(trunk: Trunk, index: int, states: States) -> None:
    """Whether what the MLP adds is linear in what its matrices put out: not where a norm follows them."""
    layer = trunk.units[index].module
    writers = halves(layer)[MLP].modules(layer)
    whole = trunk.apply(index, 0, states[0])
    base = run_without(trunk, index, states[:1], {(index, MLP)})[0]
    with _doubled(writers):
        double = trunk.apply(index, 0, states[0])
    gap = float(((double - whole) - (whole - base)).abs().max())
    if gap > 1e-2 * float((whole - base).abs().max()):
        raise UserError(
            f"{trunk.units[index].name} normalises what its MLP puts out, so no linear map can be folded into it"
        )


@contextlib.contextmanager
def _doubled(modules: list[nn.Module]) -> Iterator[None]:
    def double(module: nn.Module, args: Any, output: Any) -> Any:
        return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output

    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(double).remove)
        yield
