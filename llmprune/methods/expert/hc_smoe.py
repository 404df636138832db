"""HC-SMoE: cluster experts by what they put out, and average each cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llmprune.engine.experts import each_routing
from llmprune.engine.routing import Routed
from llmprune.engine.trunk import Trunk
from llmprune.methods.expert.merging import choices, merge
from llmprune.methods.structural import TEXT, Decision, DropExperts


@dataclass(frozen=True)
class HCSMoE:
    """Average-linkage clustering of the experts' mean outputs; the weights of a cluster are averaged by use.

    Chen et al. 2024, "Retraining-Free Merging of Sparse MoE via Hierarchical Clustering", section 3.2: every expert
    sees all calibration tokens, distances are Euclidean, and an expert's weight in the average is the number of
    tokens that the router sends it. Experts of different router groups are never merged.
    """

    kind: ClassVar[str] = "expert"
    needs: ClassVar[frozenset[str]] = frozenset({TEXT})
    patterns: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2410.08589"
    takes_list: ClassVar[bool] = False
    memory: ClassVar[str] = "one layer and its activations, and in the end all experts in float32"

    def decide(self, trunk: Trunk, drop: DropExperts) -> Decision:
        sums: dict[int, list[torch.Tensor]] = {index: [] for index in drop.layers}
        used = {index: torch.zeros(drop.experts, dtype=torch.float64) for index in drop.layers}
        tokens = dict.fromkeys(drop.layers, 0)

        def take(index: int, call: Routed) -> None:
            everyone = torch.arange(len(call.hidden_TD), device=call.hidden_TD.device)
            outputs = [call.output(expert, everyone).double().sum(0).cpu() for expert in range(drop.experts)]
            sums[index] = [a + b for a, b in zip(sums[index], outputs, strict=True)] if sums[index] else outputs
            used[index] += choices(call, drop.experts)
            tokens[index] += len(everyone)

        each_routing(trunk, drop.layers, take)
        clusters = {index: _in_groups(torch.stack(sums[index]) / tokens[index], drop) for index in drop.layers}
        return merge(trunk, drop, clusters, used)


def _in_groups(mean_ED: torch.Tensor, drop: DropExperts) -> list[list[int]]:
    size, stay = drop.experts // drop.groups, (drop.experts - drop.count) // drop.groups
    starts = range(0, drop.experts, size)
    return [
        [start + one for one in cluster]
        for start in starts
        for cluster in average_linkage(mean_ED[start : start + size], stay)
    ]


def average_linkage(points_ND: torch.Tensor, count: int) -> list[list[int]]:
    """Join the two clusters with the least mean distance of their points until `count` are left; ties to the first."""
    distance_NN = torch.cdist(points_ND, points_ND)
    clusters = [[index] for index in range(len(points_ND))]
    while len(clusters) > count:
        pairs = [(a, b) for a in range(len(clusters)) for b in range(a + 1, len(clusters))]
        a, b = min(pairs, key=lambda pair: float(distance_NN[clusters[pair[0]]][:, clusters[pair[1]]].mean()))
        clusters[a] = sorted(clusters[a] + clusters.pop(b))
    return clusters
