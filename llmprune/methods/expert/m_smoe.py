"""M-SMoE: merge experts that the router treats alike into the ones it uses most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from llmprune.arch.discover import ROUTER, Unit
from llmprune.engine.experts import each_routing
from llmprune.engine.routing import Routed
from llmprune.engine.trunk import Trunk
from llmprune.methods.expert.merging import Clusters, choices, merge
from llmprune.methods.structural import TEXT, Decision, DropExperts
from llmprune.types import UserError


@dataclass(frozen=True)
class MSMoE:
    """The most used experts stay; every other one joins the one whose router logits are most like its own.

    Li et al. 2024, "Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy", section 3.1:
    likeness is the cosine of two experts' router logits over all calibration tokens; channels are aligned to the expert
    that stays; the average is by the number of tokens. Every layer keeps as many experts (the paper shares
    them out by use over all layers). Experts of different router groups are never merged.

    `align`: permute each expert's channels before averaging.
    """

    align: bool = True

    kind: ClassVar[str] = "expert"
    needs: ClassVar[frozenset[str]] = frozenset({TEXT})
    patterns: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2310.01334"
    takes_list: ClassVar[bool] = False
    memory: ClassVar[str] = "one layer and its activations, and in the end all experts in float32"

    def decide(self, trunk: Trunk, drop: DropExperts) -> Decision:
        routers = {index: _router(trunk.units[index], drop.experts) for index in drop.layers}
        grams = {index: torch.zeros(drop.experts, drop.experts, dtype=torch.float64) for index in drop.layers}
        used = {index: torch.zeros(drop.experts, dtype=torch.float64) for index in drop.layers}

        def take(index: int, call: Routed) -> None:
            owner = trunk.model.get_submodule(routers[index])
            bias_E = getattr(owner, "bias", None)
            logits_TE = F.linear(call.hidden_TD, owner.weight.to(call.hidden_TD.dtype), bias_E).double()  # type: ignore[operator]
            grams[index] += (logits_TE.T @ logits_TE).cpu()
            used[index] += choices(call, drop.experts)

        each_routing(trunk, drop.layers, take)
        clusters = {index: clusters_around(grams[index], used[index], drop) for index in drop.layers}
        return merge(trunk, drop, clusters, used, align=self.align)


def clusters_around(gram_EE: torch.Tensor, used_E: torch.Tensor, drop: DropExperts) -> Clusters:
    """The most used experts of each router group, each with those whose logits are most like its own; ties to the first.

    `gram_EE`: inner products of the experts' logits over all tokens.
    """
    norm_E = gram_EE.diagonal().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    cosine_EE = gram_EE / norm_E[:, None] / norm_E
    centres = drop.lowest(dict(enumerate(used_E.tolist())))
    found: dict[int, list[int]] = {centre: [centre] for centre in centres}
    size = drop.experts // drop.groups
    for expert in range(drop.experts):
        if expert not in found:
            near = [centre for centre in centres if centre // size == expert // size]
            found[max(near, key=lambda centre: (float(cosine_EE[expert, centre]), -centre))].append(expert)
    return [sorted(one) for one in found.values()]


def _router(unit: Unit, experts: int) -> str:
    """The module that gives every expert of a layer its logit; raises UserError where there is none."""
    names = [
        name
        for name, why in unit.left_alone.items()
        if why == ROUTER and unit.module.get_parameter(name.removeprefix(unit.prefix)).shape[0] == experts
    ]
    if not names:
        raise UserError(f"{unit.name} has no router with a row for each of its {experts} experts; choose hc-smoe")
    return names[0].rpartition(".")[0]
