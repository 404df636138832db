"""Experts that become one: the average of each cluster, by how often the router chooses its members."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from llmprune.arch.discover import expert_blocks
from llmprune.checkpoint.surgery import Surgery
from llmprune.engine.routing import Routed
from llmprune.engine.trunk import Trunk
from llmprune.methods.expert.alignment import best_order, channel_axes
from llmprune.methods.structural import Decision, DropExperts

Clusters = list[list[int]]


def choices(call: Routed, experts: int) -> torch.Tensor:
    """How many tokens of a call are sent to each expert, float64."""
    return torch.bincount(call.chosen_TK.flatten().cpu(), minlength=experts)[:experts].double()


def merge(
    trunk: Trunk,
    drop: DropExperts,
    clusters: Mapping[int, Clusters],
    used: Mapping[int, torch.Tensor],
    *,
    align: bool = False,
) -> Decision:
    """One expert for every cluster of a layer, in the place of its most used member.

    `used`: tokens of each expert, by layer, the weights of the average. `align`: first bring the channels of every
    member into the order that fits the most used one best. Every router row is answered by its cluster's expert.
    """
    kept: dict[int, tuple[int, ...]] = {}
    rows: dict[int, tuple[int, ...]] = {}
    replaced: dict[str, torch.Tensor] = {}
    for index, found in clusters.items():
        places = [max(one, key=lambda expert: (float(used[index][expert]), -expert)) for one in found]
        answers = {expert: place for one, place in zip(found, places, strict=True) for expert in one}
        kept[index] = tuple(sorted(places))
        rows[index] = tuple(answers[expert] for expert in range(drop.experts))
        replaced.update(_averaged(trunk, index, found, places, used[index], align=align))
    surgery = Surgery(drop.depth, tuple(range(drop.depth)), kept, replaced, rows=rows)
    figures = {"expert_tokens": {str(index): one.tolist() for index, one in used.items()}}
    return Decision(surgery, {}, figures, {"clusters": {str(index): one for index, one in clusters.items()}})


def _averaged(
    trunk: Trunk, index: int, clusters: Clusters, places: Sequence[int], used_E: torch.Tensor, *, align: bool
) -> dict[str, torch.Tensor]:
    """The parameters of the experts of a layer, the average of every cluster in the place of its most used member."""
    unit = trunk.units[index]
    found = {}
    with trunk.loaded(index):
        for path, block in expert_blocks(unit.module):
            values = {short: one.detach().float().clone() for short, one in block.named_parameters()}
            axes = channel_axes(block) if align else {}
            for cluster, place in zip(clusters, places, strict=True):
                for expert in cluster if axes else ():
                    if expert != place:
                        order_C = best_order(axes, _of(values, expert), _of(values, place))
                        for short, axis in axes.items():
                            values[short][expert] = axis.permuted(values[short][expert], order_C)
                # a cluster that no token reached is averaged evenly
                weight = used_E[cluster] if float(used_E[cluster].sum()) else torch.ones(len(cluster)).double()
                for value in values.values():
                    share = (weight / weight.sum()).to(value.device)
                    value[place] = torch.einsum("e,e...->...", share, value[cluster].double()).float()
            found.update({f"{unit.prefix}{path}.{short}": value for short, value in values.items()})
    return found


def _of(values: Mapping[str, torch.Tensor], expert: int) -> dict[str, torch.Tensor]:
    return {short: value[expert] for short, value in values.items()}
