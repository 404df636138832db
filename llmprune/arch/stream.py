"""The residual stream of a decoder: what reads it, what writes to it, and the norms in between."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from llmprune.arch.roles import LayerRoles, Roles, Weight
from llmprune.types import UserError


@dataclass(frozen=True)
class Half:
    """`norm`, then `modules` one after another (paths in the layer): what they give is added to the stream.

    `readers` take the normed stream; `writers` give what is added.
    """

    norm: str
    modules: tuple[str, ...]
    readers: tuple[Weight, ...]
    writers: tuple[Weight, ...]


class Stream:
    """The two halves, attention and MLP, of every layer. Raises UserError where a layer has not a norm for each."""

    def __init__(self, roles: Roles) -> None:
        self.roles = roles
        widths = {roles.model.get_parameter(name).shape[1] for name in roles.embeddings}
        if widths != {roles.hidden}:
            raise UserError(
                f"embeddings {widths} wide become {roles.hidden} dimensions of the hidden state by a matrix of their own; "
                "such a hidden state cannot be turned"
            )
        self.layers = [self._halves(index, layer) for index, layer in enumerate(roles.layers)]
        first = roles.model.get_submodule(f"{roles.path}.0.{self.layers[0][0].norm}")
        self.centred = isinstance(first, nn.LayerNorm)

    @property
    def hidden(self) -> int:
        return self.roles.hidden

    def prefix(self, index: int) -> str:
        return f"{self.roles.path}.{index}."

    def _halves(self, index: int, layer: LayerRoles) -> tuple[Half, Half]:
        prefix = self.prefix(index)
        norms = list(dict.fromkeys(name.removeprefix(prefix).rpartition(".")[0] for name in layer.norms))
        if len(norms) != 2:
            raise UserError(
                f"layers of {type(self.roles.model).__name__} have {len(norms)} norms; a hidden state can only be turned "
                "where attention and MLP have one each, before them"
            )
        one = layer.attention
        blocks = [block for block in (layer.mlp, layer.experts, layer.shared) if block is not None]
        queries = tuple(weight for weight in (one.query, one.key, one.value, one.fused) if weight)
        readers = tuple(weight for block in blocks for weight in (block.gate, block.up, block.gate_up) if weight)
        writers = tuple(block.down for block in blocks)
        if layer.router:
            shape = self.roles.model.get_parameter(layer.router).shape
            readers += (Weight(layer.router, shape, 0, 1),)
        attention = _top(one.output, prefix)
        mlp = _top(writers[0], prefix)
        # without a module of its own an MLP is its two matrices and what lies between
        chain = (mlp,) if mlp != _path(writers[0], prefix) else (_path(readers[0], prefix), "activation_fn", mlp)
        return Half(norms[0], (attention,), queries, (one.output,)), Half(norms[1], chain, readers, writers)


def _path(weight: Weight, prefix: str) -> str:
    return weight.name.removeprefix(prefix).removesuffix(".weight")


def _top(weight: Weight, prefix: str) -> str:
    return _path(weight, prefix).partition(".")[0]
