"""A second set of forwards through the dense weights, so that inputs can be compared token by token."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from llmprune.arch.discover import Unit, expert_blocks
from llmprune.engine.observe import InputKey, Observe, Product, input_key
from llmprune.engine.residual import Residual, recorded, writers
from llmprune.engine.suspend import Suspended, first_tensor
from llmprune.types import RunError


@dataclass
class Inputs:
    """What one batch fed to a unit in the dense model.

    `products`: inputs of each matrix, T x I, in the order of its uses. `blocks`: first arguments of
    each expert block, in the order of its calls. Which expert sees a token is for the pruned model to
    decide, so a block is replayed on its dense input with the pruned model's routing. `output`: what the
    unit returned, where forwards stop at its exit. `residual`: how that came about, where it can be told.
    """

    products: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    output: torch.Tensor | None = None
    blocks: dict[nn.Module, list[torch.Tensor]] = field(default_factory=dict)
    residual: Residual | None = None

    def next_of(self, name: str) -> torch.Tensor | None:
        """The input of the next use of a matrix; it is given out once, so that it can be freed."""
        waiting = self.products.get(name)
        return waiting.pop(0) if waiting else None


class DenseStream:
    """The calibration batches on their way through the dense model, always one unit ahead of the pruning."""

    def __init__(self, suspended: Suspended) -> None:
        self._suspended = suspended

    def start(self) -> None:
        self._suspended.start()

    def through(self, unit: Unit, wanted: dict[str, nn.Parameter]) -> list[Inputs]:
        """Take every batch through `unit`, which holds its dense weights; what each batch fed to `wanted`."""
        assert self._suspended.place().name == unit.name
        inputs: list[Inputs] = []
        keys: list[tuple[str, torch.Tensor, InputKey]] = []
        inside_block = False
        paths = writers(unit.module)
        entered = [Residual.of(call) if paths else None for call in self._suspended.payloads()]
        first_output: list[torch.Tensor] = []

        def see(products: list[Product]) -> None:
            if not inside_block:
                for one in products:
                    inputs[-1].products.setdefault(one.name, []).append(one.x_TI)
                    keys.append((one.name, one.x_TI, input_key(one.x_TI)))

        def enter_block(block: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal inside_block
            inside_block = True
            if args:
                inputs[-1].blocks.setdefault(block, []).append(args[0])
                keys.append((type(block).__name__, args[0], input_key(args[0])))

        def leave_block(*_: object) -> None:
            nonlocal inside_block
            inside_block = False

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if not first_output:
                first_output.append(first_tensor(output))

        def write(path: str, output: torch.Tensor) -> None:
            if (residual := inputs[-1].residual) is not None:
                residual.added[path] = output

        observe = Observe(wanted, see)
        with contextlib.ExitStack() as stack:
            for _, block in expert_blocks(unit.module):
                stack.callback(block.register_forward_pre_hook(enter_block).remove)
                stack.callback(block.register_forward_hook(leave_block).remove)
            # first, since forwards are suspended where they leave the last unit
            stack.callback(unit.module.register_forward_hook(leave, prepend=True).remove)
            stack.enter_context(recorded(unit.module, paths, write))
            stack.enter_context(observe)
            for number in self._suspended.advance_each():
                inputs.append(Inputs(residual=entered[number]))
            if self._suspended.place().kind == "exit":
                for one, (_, output) in zip(inputs, self._suspended.payloads(), strict=True):
                    one.output = first_tensor(output)
                self._suspended.advance()
        residual = inputs[0].residual
        if residual is not None and not residual.explains(first_output[0]):
            for one in inputs:
                one.residual = None
        for name, x_TI, key in keys:
            if input_key(x_TI) != key:
                raise RunError(f"the input of {name} is changed in place, so it cannot be compared: set retarget=0")
        return inputs
