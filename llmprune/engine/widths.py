"""What the units of a layer do on the calibration tokens: the inputs of the matrix that each half writes with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from llmprune.arch.units import Units
from llmprune.engine.collect import Collector
from llmprune.engine.dense import Inputs
from llmprune.engine.observe import Observe, Product
from llmprune.engine.trunk import States, Trunk
from llmprune.statistics import Stats


@dataclass
class Evidence:
    """The units that write through one matrix: of experts, those of one.

    `writer_OI`: that matrix, float32; unit u feeds its columns `columns_UN[u]`. `stats`: of its inputs; None if no
    token was seen. `first`: the number of the first unit among all of its place. `values`: the layer's parameters.
    Key dimensions feed none: N and I are 0, and `stats` are of what queries and keys are computed from.
    """

    units: Units
    first: int
    columns_UN: torch.Tensor
    strata: int
    writer_OI: torch.Tensor
    stats: Stats | None
    values: Mapping[str, torch.Tensor] = field(repr=False)

    @property
    def count(self) -> int:
        return len(self.columns_UN)

    @property
    def matrix(self) -> str:
        """The name of the matrix that the units write through."""
        assert self.units.writer is not None
        name = self.units.writer.name
        return f"{name}[{self.first // self.units.size}]" if self.units.stacked else name

    def per_unit(self, value_I: torch.Tensor) -> torch.Tensor:
        """The sum of a value of every input of the writer over the inputs of each unit."""
        return value_I[self.columns_UN.to(value_I.device)].sum(1)

    def weights(self) -> Iterator[torch.Tensor]:
        """Of every parameter that the units have slices in, those slices: U units x N slices x their entries, float32."""
        for member in self.units.members:
            index_UN = member.index_UN[self.first : self.first + self.count]
            value = self.values[member.parameter]
            axis = member.axis
            if self.units.stacked:
                value, axis = value[self.first // self.units.size], axis - 1
            if not member.norm:
                rows = value.movedim(axis, 0)[index_UN.to(value.device)]
                yield rows.flatten(2).float() if rows.dim() > 2 else rows[..., None].float()


def slices(units: Units, values: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """Of those parameters that are among `values`, the slices of units that lie in the whole model: U x N x entries."""
    for member in units.members:
        if member.parameter in values:
            rows = values[member.parameter].movedim(member.axis, 0)[member.index_UN]
            yield rows.flatten(2).float() if rows.dim() > 2 else rows[..., None].float()


def evidences(units: Units, stats: Mapping[str, Stats], values: Mapping[str, torch.Tensor]) -> Iterator[Evidence]:
    """The evidence of a place, one for every matrix that its units write through."""
    if units.reader is not None:
        none = torch.empty(0, 0)
        columns_UN = torch.empty(units.count, 0, dtype=torch.int64)
        yield Evidence(units, 0, columns_UN, units.strata, none, stats.get(units.reader.name), values)
        return
    assert units.writer is not None and units.columns_UN is not None
    writer = units.writer
    weight = values[writer.name]
    if not units.stacked:
        matrix_OI = weight if writer.output_axis == 0 else weight.T
        columns_UN = units.columns_UN.to(weight.device)
        yield Evidence(units, 0, columns_UN, units.strata, matrix_OI.float(), stats.get(writer.name), values)
        return
    for expert in range(units.strata):
        first = expert * units.size
        columns_UN = units.columns_UN[first : first + units.size].to(weight.device)
        found = stats.get(f"{writer.name}[{expert}]")
        yield Evidence(units, first, columns_UN, 1, weight[expert].float(), found, values)


def measure(
    trunk: Trunk,
    index: int,
    states: States,
    matrices: Sequence[str],
    kinds: frozenset[str],
    dense: list[Inputs] | None = None,
) -> dict[str, Stats]:
    """Statistics of the inputs of some matrices of layer `index`, whose weights are loaded.

    `dense`: what each batch feeds to these matrices in the dense model (see `record`), for how the inputs moved.
    """
    collector = Collector(_parameters(trunk, index, matrices), kinds)
    calls = [trunk.call(index, batch, state) for batch, state in enumerate(states)]
    collector.run(trunk.units[index].module, calls, dense=dense)
    trunk.runs += 1
    return collector.totals()


def record(trunk: Trunk, index: int, states: States, matrices: Sequence[str]) -> tuple[list[Inputs], States]:
    """What each batch feeds to some matrices of layer `index`, and the states that leave it.

    Holds these inputs of all batches.
    """
    inputs: list[Inputs] = []

    def see(products: list[Product]) -> None:
        for one in products:
            inputs[-1].products.setdefault(one.name, []).append(one.x_TI)

    outputs: States = []
    with Observe(_parameters(trunk, index, matrices), see):
        for batch, state in enumerate(states):
            inputs.append(Inputs())
            outputs.append(trunk.apply(index, batch, state))
    trunk.runs += 1
    return inputs, outputs


def _parameters(trunk: Trunk, index: int, names: Sequence[str]) -> dict[str, nn.Parameter]:
    unit = trunk.units[index]
    return {name: unit.module.get_parameter(name.removeprefix(unit.prefix)) for name in names}
