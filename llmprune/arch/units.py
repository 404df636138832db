"""What can be taken out of a model's width: units, and the slices of parameters that go together with each.

The one place that knows how heads and channels lie in the parameters. How many slices a unit has in a parameter
depends on the layout alone, so all of them are index tables; cutting, counting and scoring only read those.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from llmprune.arch.roles import Attention, LayerRoles, Mlp, Roles, Weight

KV_GROUP = "kv-group"  # a key-value head with all query heads that read it
QUERY_HEAD = "query-head"  # a query head alone; every kv group keeps as many
KEY = "key-dimension"  # what queries and keys are compared by: a dimension, or a pair that rotary embedding turns
VALUE = "value-dimension"  # a dimension of what a kv head hands on; every kv head keeps as many
WITHIN_HEADS = (KEY, VALUE)  # whose numbers no plain class tells from the width of a head
CHANNEL = "channel"  # an inner feature of an MLP
EXPERT_CHANNEL = "expert-channel"  # the same of one expert; every expert keeps as many
RESIDUAL = "residual"  # a dimension of the hidden state, in the whole model at once


@dataclass(frozen=True)
class Member:
    """The slices of a parameter along an axis that belong to each unit: U units x N slices.

    In the stacked matrices of experts the index counts within the matrix of the unit's own expert. `norm`: the gain
    of a norm whose mean runs over the axis.
    """

    parameter: str
    axis: int
    index_UN: torch.Tensor
    norm: bool = False


class Rows(NamedTuple):
    """The outputs of a matrix that belong to each head: heads x dimensions."""

    weight: Weight
    index_HR: torch.Tensor


@dataclass(frozen=True)
class Units:
    """The `count` units of one kind in a layer (or, with `layer` None, in the model).

    Units are numbered in `strata` runs of equal size, each of which must keep as many: kv groups of query heads
    or of key and value dimensions, experts of expert channels. `writer` is the matrix whose input columns `columns_UN` the
    units produce; key dimensions have none, but a `reader`, whose inputs they are computed from. `cost`: parameters that
    go with one unit.
    """

    kind: str
    layer: int | None
    count: int
    strata: int
    members: tuple[Member, ...]
    cost: int
    writer: Weight | None = None
    columns_UN: torch.Tensor | None = None
    reader: Weight | None = None

    @property
    def size(self) -> int:
        """Units in a stratum."""
        return self.count // self.strata

    @property
    def dimensions(self) -> int:
        """The entries of a unit along the axis where it has fewest: 2 of a pair of dimensions."""
        return min(one.index_UN.shape[1] for one in self.members)

    def first(self, count: int) -> list[int]:
        """`count` units, the first ones of each stratum."""
        each = count // self.strata
        return [run * self.size + unit for run in range(self.strata) for unit in range(each)]

    @property
    def stacked(self) -> bool:
        """Whether the strata are experts, each with a matrix of its own."""
        return self.kind == EXPERT_CHANNEL


def find_units(roles: Roles, kinds: Sequence[str], shapes: Mapping[str, torch.Size] | None = None) -> list[Units]:
    """All units of some kinds, layer by layer; kinds that a layer does not have are passed over.

    `shapes`: those of the parameters where they are not the model's, by which the units cost less.
    """
    shapes = shapes or {name: one.shape for name, one in roles.model.named_parameters()}
    found: list[Units] = []
    for index, layer in enumerate(roles.layers):
        for kind in kinds:
            found.extend(_of_layer(kind, index, layer, shapes))
    return [*found, _residual(roles, shapes)] if RESIDUAL in kinds else found


def _of_layer(kind: str, index: int, layer: LayerRoles, shapes: Mapping[str, torch.Size]) -> Iterator[Units]:
    if kind in (KV_GROUP, QUERY_HEAD):
        yield _heads(kind, index, layer.attention, shapes)
    elif kind == KEY and not layer.attention.between:
        yield _keys(index, layer.attention, shapes)
    elif kind == VALUE:
        yield _values(index, layer.attention, shapes)
    elif kind == CHANNEL and layer.mlp is not None:
        yield _channels(kind, index, layer.mlp, shapes)
    elif kind == EXPERT_CHANNEL and layer.experts is not None:
        yield _channels(kind, index, layer.experts, shapes)


def heads_of(one: Attention) -> tuple[Rows, Rows, Rows]:
    """Where the outputs of every query head, key head and value head are."""
    if one.fused is None:
        assert one.query and one.key and one.value
        parts = ((one.query, one.heads), (one.key, one.groups), (one.value, one.groups))
        query, key, value = (Rows(weight, _runs(count, one.head_dim)) for weight, count in parts)
        return query, key, value
    runs_SH = _runs(one.heads + 2 * one.groups, one.head_dim)
    if one.order == "stacked":
        queries, keys, values = runs_SH.split((one.heads, one.groups, one.groups))
    else:
        grouped_GSH = runs_SH.view(one.groups, -1, one.head_dim)
        queries, keys, values = grouped_GSH[:, :-2].flatten(0, 1), grouped_GSH[:, -2], grouped_GSH[:, -1]
    return Rows(one.fused, queries), Rows(one.fused, keys), Rows(one.fused, values)


def _heads(kind: str, index: int, one: Attention, shapes: Mapping[str, torch.Size]) -> Units:
    """Query head q reads kv head floor(q / r), r = heads / groups."""
    whole = kind == KV_GROUP
    count = one.groups if whole else one.heads
    queries_UN, keys_UN = _runs(count, one.heads * one.head_dim // count), _runs(one.groups, one.head_dim)
    query, key, value = heads_of(one)
    members = _rows(query.weight, query.index_HR.reshape(count, -1))
    members += [*_rows(*key), *_rows(*value)] if whole else []
    for norm, index_UN in ((one.query_norm, queries_UN), (one.key_norm, keys_UN if whole else None)):
        # a norm of each head by itself has one gain for all of them, and stays
        if norm is not None and index_UN is not None and shapes[norm].numel() != one.head_dim:
            members.append(Member(norm, 0, index_UN, norm=True))
    members.append(Member(one.output.name, one.output.input_axis, queries_UN))
    strata = 1 if whole else one.groups
    return _units(kind, index, count, strata, members, shapes, one.output, queries_UN)


def _keys(index: int, one: Attention, shapes: Mapping[str, torch.Size]) -> Units:
    """Dimensions that turn together, as rows of k and of q in each query head of the group."""
    query, key, _ = heads_of(one)
    keys_GPN = key.index_HR[:, one.turned_PN]
    queries_GPRN = query.index_HR[:, one.turned_PN].unflatten(0, (one.groups, -1)).transpose(1, 2)
    members = [*_rows(query.weight, queries_GPRN.flatten(2).flatten(0, 1)), *_rows(key.weight, keys_GPN.flatten(0, 1))]
    count = one.groups * len(one.turned_PN)
    return _units(KEY, index, count, one.groups, members, shapes, reader=query.weight)


def _values(index: int, one: Attention, shapes: Mapping[str, torch.Size]) -> Units:
    """A row of v, and the column of o that takes it up in each query head of the group."""
    value = heads_of(one)[2]
    columns_GHR = _runs(one.heads, one.head_dim).unflatten(0, (one.groups, -1)).transpose(1, 2)
    columns_UN = columns_GHR.flatten(0, 1)
    members = [
        *_rows(value.weight, value.index_HR.reshape(-1, 1)),
        Member(one.output.name, one.output.input_axis, columns_UN),
    ]
    return _units(VALUE, index, len(columns_UN), one.groups, members, shapes, one.output, columns_UN)


def _channels(kind: str, index: int, one: Mlp, shapes: Mapping[str, torch.Size]) -> Units:
    rows_UN = torch.arange(one.channels)[:, None].repeat(one.experts, 1)
    members: list[Member] = []
    for matrix in (one.gate, one.up):
        members += _rows(matrix, rows_UN) if matrix else []
    if one.gate_up:
        members += _rows(one.gate_up, torch.cat([rows_UN, one.channels + rows_UN], 1))
    members.append(Member(one.down.name, one.down.input_axis, rows_UN))
    return _units(kind, index, len(rows_UN), one.experts, members, shapes, one.down, rows_UN)


def _residual(roles: Roles, shapes: Mapping[str, torch.Size]) -> Units:
    """Column i of all that reads the hidden state, row i of all that writes to it, and gain i of every norm."""
    index_UN = torch.arange(roles.hidden)[:, None]
    members = [Member(name, 1, index_UN) for name in roles.embeddings]
    members += [Member(roles.head, 1, index_UN)] if roles.head else []
    norms = [*roles.final_norm]
    for layer in roles.layers:
        attention = layer.attention
        blocks = [one for one in (layer.mlp, layer.experts, layer.shared) if one is not None]
        readers = [attention.query, attention.key, attention.value, attention.fused]
        readers += [matrix for one in blocks for matrix in (one.gate, one.up, one.gate_up)]
        members += [Member(one.name, one.input_axis, index_UN) for one in readers if one is not None]
        members += [Member(layer.router, 1, index_UN)] if layer.router else []
        for writer in (attention.output, *(one.down for one in blocks)):
            members += _rows(writer, index_UN)
        norms += layer.norms
    members += [Member(name, 0, index_UN, norm=True) for name in norms]
    return _units(RESIDUAL, None, roles.hidden, 1, members, shapes)


def _units(
    kind: str,
    layer: int | None,
    count: int,
    strata: int,
    members: list[Member],
    shapes: Mapping[str, torch.Size],
    writer: Weight | None = None,
    columns_UN: torch.Tensor | None = None,
    reader: Weight | None = None,
) -> Units:
    alone = strata if kind == EXPERT_CHANNEL else 1  # a unit has slices in the matrix of its own expert only
    cost = sum(
        one.index_UN.shape[1] * math.prod(shapes[one.parameter]) // shapes[one.parameter][one.axis] // alone
        for one in members
    )
    return Units(kind, layer, count, strata, tuple(members), cost, writer, columns_UN, reader)


def _rows(weight: Weight, index_UN: torch.Tensor) -> list[Member]:
    """Outputs of a matrix, and of its bias."""
    bias = [Member(weight.bias, 0, index_UN)] if weight.bias else []
    return [Member(weight.name, weight.output_axis, index_UN), *bias]


def _runs(count: int, size: int) -> torch.Tensor:
    """`count` runs of `size` consecutive numbers from 0."""
    return torch.arange(count * size).view(count, size)
