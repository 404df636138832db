"""A decoder layer as a function of the weights of its matrices, for methods that look at all of them together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from llmprune.arch.discover import Unit
from llmprune.engine.observe import Observe, Product
from llmprune.engine.suspend import Call, first_tensor
from llmprune.statistics import Stats
from llmprune.types import Budget, MatrixSpec
from llmprune.weights import stored_matrix


class _Enough(BaseException):
    """Raised inside a layer once what was asked for has been seen."""


@dataclass(frozen=True)
class Solved:
    """A matrix of the layer: its dense weights (float32, outputs x inputs), its inputs, and what was to be pruned of it."""

    spec: MatrixSpec
    dense_OI: torch.Tensor
    stats: Stats
    budget: Budget


@dataclass(frozen=True)
class Layer:
    """A layer whose matrices are solved by now, on the batches that entered it from the pruned layers before.

    `matrices`: by name, in the order in which they were solved. `targets`: what the dense model's layer put out for each
    batch.
    """

    unit: Unit
    matrices: dict[str, Solved]
    calls: list[Call]
    targets: list[torch.Tensor]

    @property
    def module(self) -> nn.Module:
        return self.unit.module

    def output(self, batch: int, weights_OI: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What the layer puts out for a batch with these weights of some matrices, of which it is a function."""
        parts: dict[str, dict[int | None, torch.Tensor]] = {}
        for name, weight_OI in weights_OI.items():
            spec = self.matrices[name].spec
            laid_out = weight_OI.T if spec.transposed else weight_OI
            parts.setdefault(spec.parameter.removeprefix(self.unit.prefix), {})[spec.index] = laid_out
        values = {}
        for name, slices in parts.items():
            present = self.module.get_parameter(name)
            whole = (
                slices[None] if None in slices else torch.stack([slices.get(i, one) for i, one in enumerate(present)])
            )
            values[name] = whole.to(present.dtype)
        args, kwargs = self.calls[batch]
        return first_tensor(functional_call(self.module, values, args, kwargs))

    def inputs(self, name: str) -> Iterator[torch.Tensor]:
        """What each batch feeds to a matrix with the present weights, tokens x inputs."""
        spec = self.matrices[name].spec
        seen: list[torch.Tensor] = []

        def see(products: list[Product]) -> None:
            seen.extend(one.x_TI for one in products if one.name == spec.name)
            if seen:
                raise _Enough

        for args, kwargs in self.calls:
            seen.clear()
            try:
                with Observe({spec.parameter: _parameter(self.unit, spec)}, see):
                    self.module(*args, **kwargs)
            except _Enough:
                yield seen[0]

    def present(self, name: str) -> torch.Tensor:
        """The weights of a matrix as they are now, float32, outputs x inputs."""
        spec = self.matrices[name].spec
        stored = stored_matrix(self.unit, spec)
        return (stored.T if spec.transposed else stored).float()


def _parameter(unit: Unit, spec: MatrixSpec) -> nn.Parameter:
    return unit.module.get_parameter(spec.parameter.removeprefix(unit.prefix))
