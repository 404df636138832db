"""Inputs of matrices whose order is the model's own affair: any other order, taken along by the matrices before, computes the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from llmprune.arch.roles import Attention, Mlp, Roles, Weight


@dataclass(frozen=True)
class Slices:
    """Slices of a parameter (of one of its experts) along an axis that change places together: R runs of N each."""

    parameter: str
    expert: int | None
    axis: int
    index_RN: torch.Tensor

    def reorder(self, value: torch.Tensor, order_N: torch.Tensor) -> None:
        """Put slice `order[n]` of every run at the run's n-th place, in place."""
        one = value if self.expert is None else value[self.expert]
        from_N, to_N = (index_RN.flatten().to(value.device) for index_RN in (self.index_RN[:, order_N], self.index_RN))
        one.index_copy_(self.axis, to_N, one.index_select(self.axis, from_N))


@dataclass(frozen=True)
class FreeInputs:
    """Inputs of a matrix that one order can be chosen for: `inputs` are its columns, `outputs` the slices that feed them."""

    inputs: Slices
    outputs: tuple[Slices, ...]

    @property
    def matrix(self) -> str:
        """The name of the matrix, as `MatrixSpec.name`."""
        one = self.inputs
        return one.parameter if one.expert is None else f"{one.parameter}[{one.expert}]"

    @property
    def count(self) -> int:
        return self.inputs.index_RN.shape[1]


def free_inputs(roles: Roles) -> list[list[FreeInputs]]:
    """For every layer: inner channels of MLPs and experts, and the features of each value head.

    Query heads that read the same values take the same order. All other inputs are the hidden state, whose order all
    layers share.
    """
    layers = []
    for layer in roles.layers:
        found = list(_values(layer.attention))
        for block in (layer.mlp, layer.shared):
            found += [] if block is None else [_channels(block, None)]
        if layer.experts is not None:
            found += [_channels(layer.experts, expert) for expert in range(layer.experts.experts)]
        layers.append(found)
    return layers


def _channels(mlp: Mlp, expert: int | None) -> FreeInputs:
    index_1N = torch.arange(mlp.channels)[None]
    outputs = [one for matrix in (mlp.gate, mlp.up) for one in _rows(matrix, expert, index_1N)]
    outputs += _rows(mlp.gate_up, expert, torch.cat([index_1N, mlp.channels + index_1N]))
    return FreeInputs(_columns(mlp.down, expert, index_1N), tuple(outputs))


def _values(one: Attention) -> Iterator[FreeInputs]:
    """Query head q reads kv head floor(q / r), r = heads / groups."""
    wide, ratio = one.head_dim, one.heads // one.groups
    features_N = torch.arange(wide)
    for group in range(one.groups):
        heads_R1 = ratio * group + torch.arange(ratio)[:, None]
        if one.fused is None:
            start = group * wide
        elif one.order == "stacked":
            start = (one.heads + one.groups + group) * wide
        else:
            start = (group * (ratio + 2) + ratio + 1) * wide
        outputs = _rows(one.value if one.fused is None else one.fused, None, (start + features_N)[None])
        yield FreeInputs(_columns(one.output, None, wide * heads_R1 + features_N), tuple(outputs))


def _columns(weight: Weight, expert: int | None, index_RN: torch.Tensor) -> Slices:
    return Slices(weight.name, expert, weight.input_axis - (expert is not None), index_RN)


def _rows(weight: Weight | None, expert: int | None, index_RN: torch.Tensor) -> list[Slices]:
    """Outputs of a matrix, and of its bias."""
    if weight is None:
        return []
    found = [Slices(weight.name, expert, weight.output_axis - (expert is not None), index_RN)]
    return found + ([Slices(weight.bias, expert, 0, index_RN)] if weight.bias else [])
