"""The inner channels of an expert in another order: it computes the same, and lies closer to another expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmprune.solvers.assignment import assign
from llmprune.types import UserError


@dataclass(frozen=True)
class ChannelAxis:
    """The slices of one expert's part of a parameter, along `axis`, that belong to each channel: C x N slices."""

    axis: int
    index_CN: torch.Tensor

    def rows(self, value: torch.Tensor) -> torch.Tensor:
        """The numbers that belong to each channel, C x K."""
        return value.movedim(self.axis, 0)[self.index_CN].flatten(1)

    def permuted(self, value: torch.Tensor, order_C: torch.Tensor) -> torch.Tensor:
        """The same expert with channel `order_C[c]` in the place of channel c."""
        source = torch.arange(value.shape[self.axis], device=value.device)
        source[self.index_CN.flatten()] = self.index_CN[order_C].flatten()
        return value.index_select(self.axis, source)


def channel_axes(block: nn.Module) -> dict[str, ChannelAxis]:
    """Where the channels lie in the parameters of fused experts, as their class says; raises UserError if it does not."""
    layout: Any = block
    shapes = {name: one.shape for name, one in block.named_parameters(recurse=False)}
    first = "gate_up_proj" if "gate_up_proj" in shapes else "up_proj"
    if not hasattr(layout, "is_concatenated") or not shapes.keys() >= {first, "down_proj"}:
        raise UserError(
            f"{type(block).__name__} does not say where its experts' channels lie, so they cannot be aligned; "
            "set align=false, or choose hc-smoe"
        )
    outputs, inputs = (1, 0) if layout.is_transposed else (0, 1)
    channels = shapes["down_proj"][1 + inputs]
    if first == "up_proj":
        index_CN = torch.arange(channels)[:, None]
    elif layout.is_concatenated:
        index_CN = torch.arange(2 * channels).view(2, channels).T
    else:
        index_CN = torch.arange(2 * channels).view(channels, 2)
    found = {first: ChannelAxis(outputs, index_CN), "down_proj": ChannelAxis(inputs, torch.arange(channels)[:, None])}
    if f"{first}_bias" in shapes:
        found[f"{first}_bias"] = ChannelAxis(0, index_CN)
    return found


def best_order(
    axes: dict[str, ChannelAxis], expert: dict[str, torch.Tensor], to: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The order of an expert's channels (C) that brings its parameters closest to those of expert `to`.

    Weight matching (Ainsworth et al. 2023, "Git Re-Basin", section 3.2): least squared distance is largest inner
    product, an assignment of channels to channels.
    """
    products = [one.rows(to[name].double()) @ one.rows(expert[name].double()).T for name, one in axes.items()]
    return assign(torch.stack(products).sum(0))
