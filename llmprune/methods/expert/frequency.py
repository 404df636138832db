"""Expert frequency: how many tokens an expert gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmprune.engine.experts import Load
from llmprune.engine.trunk import Trunk
from llmprune.methods.expert.lowest import drop_lowest
from llmprune.methods.structural import TEXT, Decision, DropExperts


@dataclass(frozen=True)
class ExpertFrequency:
    """Drop the experts that the fewest tokens are routed to."""

    kind: ClassVar[str] = "expert"
    needs: ClassVar[frozenset[str]] = frozenset({TEXT})
    patterns: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2310.01334"
    takes_list: ClassVar[bool] = False
    memory: ClassVar[str] = "one layer and its activations"

    def decide(self, trunk: Trunk, drop: DropExperts) -> Decision:
        def score(load: Load) -> list[float]:
            counts: list[float] = load.tokens.tolist()
            return counts

        return drop_lowest(trunk, drop, score, outputs=False)
