"""REAP: router-weighted expert activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmprune.engine.experts import Load
from llmprune.engine.trunk import Trunk
from llmprune.methods.expert.lowest import drop_lowest
from llmprune.methods.structural import TEXT, Decision, DropExperts


@dataclass(frozen=True)
class REAP:
    """Drop the experts with the lowest mean of g ||f(x)|| over the tokens routed to them.

    Lasby et al. 2025, "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression", eq. 9. The gate g is
    the one that the model itself multiplies by, so sigmoid routers, renormalisation and scaling count as they are.
    """

    kind: ClassVar[str] = "expert"
    needs: ClassVar[frozenset[str]] = frozenset({TEXT})
    patterns: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2510.13999"
    takes_list: ClassVar[bool] = False
    memory: ClassVar[str] = "one layer and its activations"

    def decide(self, trunk: Trunk, drop: DropExperts) -> Decision:
        def score(load: Load) -> list[float]:
            return load.mean(load.gated_norms)

        return drop_lowest(trunk, drop, score)
