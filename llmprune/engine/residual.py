"""The residual stream of a layer: what its halves add to it, in the pruned model and in the dense one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from llmprune.arch.sublayers import halves
from llmprune.engine.suspend import Call, first_tensor
from llmprune.types import UserError

# Share of the layer's output by which it may differ from its input plus what was added: rounding of half precision.
TOLERANCE = 1e-2


@dataclass
class Residual:
    """One batch on its way through a layer: what entered, and what each writer added, by its path and in order."""

    entered: torch.Tensor
    added: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, call: Call) -> Residual:
        """At the entrance of a layer."""
        args, kwargs = call
        return cls(args[0] if args else kwargs["hidden_states"])

    def before(self, writer: str) -> torch.Tensor:
        """The stream that `writer` adds to, tokens x width."""
        stream = self.entered
        for path, added in self.added.items():
            if path == writer:
                break
            stream = stream + added.view_as(stream)
        return stream.reshape(-1, stream.shape[-1])

    def after(self, writer: str) -> torch.Tensor:
        return self.before(writer) + self.added[writer].reshape(-1, self.entered.shape[-1])

    def explains(self, output: torch.Tensor) -> bool:
        """Whether the layer's output is what entered plus what was added; a layer with other norms does more."""
        if any(added.numel() != output.numel() for added in (self.entered, *self.added.values())):
            return False
        total = self.entered.float() + sum(added.view_as(output).float() for added in self.added.values())
        return bool((total - output.float()).norm() <= TOLERANCE * output.float().norm())


def writers(layer: nn.Module) -> tuple[str, ...]:
    """Paths of the modules that write to the residual stream; none where they cannot be told."""
    try:
        return tuple(path for half in halves(layer).values() for path in half.writers)
    except UserError:
        return ()


@contextmanager
def recorded(layer: nn.Module, paths: tuple[str, ...], add: Any) -> Iterator[None]:
    """While active, `add(path, output)` hears of whatever these modules put out."""
    with ExitStack() as stack:
        for path in paths:

            def hook(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
                add(path, first_tensor(output))

            stack.callback(layer.get_submodule(path).register_forward_hook(hook).remove)
        yield
