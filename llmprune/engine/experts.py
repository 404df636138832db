"""What the experts of every layer do on the calibration tokens, in one pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from llmprune.arch.discover import expert_blocks
from llmprune.engine.routing import Routed
from llmprune.engine.trunk import Trunk
from llmprune.types import UserError


@dataclass
class Load:
    """Sums over the tokens that went to each of E experts of a layer.

    `tokens`: how many; `gates`: of the gate g; `norms`: of ||f(x)||; `gated_norms`: of g ||f(x)||.
    """

    tokens: torch.Tensor
    gates: torch.Tensor
    norms: torch.Tensor
    gated_norms: torch.Tensor

    @classmethod
    def empty(cls, experts: int) -> Load:
        return cls(*(torch.zeros(experts, dtype=torch.float64) for _ in range(4)))

    def mean(self, sums_E: torch.Tensor) -> list[float]:
        """Per token that reached the expert; 0 for one that none reached."""
        means: list[float] = (sums_E / self.tokens.clamp_min(1)).tolist()
        return means


@dataclass
class Loads:
    """The loads of all layers that have experts, by layer index."""

    by_layer: dict[int, Load] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        return {"expert_tokens": {str(index): load.tokens.tolist() for index, load in self.by_layer.items()}}


def expert_loads(trunk: Trunk, layers: tuple[int, ...], experts: int, *, outputs: bool = True) -> Loads:
    """Measure the load of every expert on the model's own routing.

    Holds one layer and its activations. `outputs`: also run each expert on its tokens for the norms of
    what it puts out, which doubles the work of the experts.
    """
    loads = Loads({index: Load.empty(experts) for index in layers})

    def take(index: int, call: Routed) -> None:
        load = loads.by_layer[index]
        for expert in call.chosen_TK.unique().tolist():
            rows_N, gates_N = call.tokens_of(expert)
            gates = gates_N.double()
            load.tokens[expert] += len(rows_N)
            load.gates[expert] += float(gates.sum())
            if outputs:
                norms_N = call.output(expert, rows_N).double().norm(dim=1)
                load.norms[expert] += float(norms_N.sum())
                load.gated_norms[expert] += float((gates * norms_N).sum())

    each_routing(trunk, layers, take)
    return loads


def each_routing(trunk: Trunk, layers: tuple[int, ...], take: Callable[[int, Routed], None]) -> None:
    """Run the model and hand every call of the expert blocks of `layers` to `take`, before it happens."""
    states = trunk.enter()
    for index in range(max(layers) + 1):
        with trunk.loaded(index), contextlib.ExitStack() as stack:
            if index in layers:
                stack.enter_context(_watched(trunk.units[index].module, partial(take, index)))
            states = trunk.run(index, states)


@contextlib.contextmanager
def _watched(layer: nn.Module, take: Callable[[Routed], None]) -> Iterator[None]:
    busy = False

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal busy
        if busy:
            return
        routed = Routed.of(block, args, kwargs)
        if routed is None:
            raise UserError(
                f"{type(block).__name__} is not told which experts were chosen; its experts cannot be scored"
            )
        busy = True
        take(routed)
        busy = False

    with contextlib.ExitStack() as stack:
        for _, block in expert_blocks(layer):
            stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
        yield
