"""Expert activation norm (EAN): how much an expert puts out in all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmprune.engine.experts import Load
from llmprune.engine.trunk import Trunk
from llmprune.methods.expert.lowest import drop_lowest
from llmprune.methods.structural import TEXT, Decision, DropExperts


@dataclass(frozen=True)
class ExpertNorm:
    """Drop the experts with the lowest sum of ||f(x)|| over the tokens routed to them.

    Jaiswal et al. 2025, "Finding Fantastic Experts in MoEs": expert activation norm.
    """

    kind: ClassVar[str] = "expert"
    needs: ClassVar[frozenset[str]] = frozenset({TEXT})
    patterns: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2504.05586"
    takes_list: ClassVar[bool] = False
    memory: ClassVar[str] = "one layer and its activations"

    def decide(self, trunk: Trunk, drop: DropExperts) -> Decision:
        def score(load: Load) -> list[float]:
            sums: list[float] = load.norms.tolist()
            return sums

        return drop_lowest(trunk, drop, score)
