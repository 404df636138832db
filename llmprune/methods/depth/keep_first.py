"""Keep the first layers, or all that the user does not name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmprune.checkpoint.surgery import Surgery
from llmprune.engine.trunk import Trunk
from llmprune.methods.structural import Decision, Drop


@dataclass(frozen=True)
class KeepFirst:
    """Drop the last layers, or those in the list; no text is read."""

    kind: ClassVar[str] = "depth"
    needs: ClassVar[frozenset[str]] = frozenset()
    patterns: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2004.03844"
    takes_list: ClassVar[bool] = True
    memory: ClassVar[str] = "no weights"

    def decide(self, trunk: Trunk, drop: Drop) -> Decision:
        dropped = drop.given or range(drop.depth - drop.count, drop.depth)
        return Decision(Surgery.drop(drop.depth, dropped))
