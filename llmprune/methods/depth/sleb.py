"""SLEB: remove one layer at a time, each time the one that is missed least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmprune.checkpoint.surgery import Surgery
from llmprune.engine.search import WHOLE, greedy
from llmprune.engine.trunk import Trunk
from llmprune.methods.structural import TEXT, Decision, Drop


@dataclass(frozen=True)
class SLEB:
    """Greedy on the language-modelling loss, all remaining layers scored again after each removal.

    Song et al. 2024, "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Transformer
    Blocks", metric 3. The reference runs the whole model for every candidate; here candidates share the layers
    before them.

    `protect_first`, `protect_last`: layers at the ends that always stay.
    """

    protect_first: int = 1
    protect_last: int = 1

    kind: ClassVar[str] = "depth"
    needs: ClassVar[frozenset[str]] = frozenset({TEXT})
    patterns: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2402.09025"
    takes_list: ClassVar[bool] = False
    memory: ClassVar[str] = "one layer, and the activations of as many variants as there are layers, in chunks that fit"

    def decide(self, trunk: Trunk, drop: Drop) -> Decision:
        free = drop.unprotected(self.protect_first, self.protect_last)
        found = greedy(trunk, [(index, WHOLE) for index in free], drop.count)
        scores = {index: loss for (index, _), loss in found.first.items()}
        removed = [index for index, _ in found.removed]
        notes = {
            "loss_dense": found.dense,
            "removed_in_order": removed,
            "loss_after_each": found.losses,
            "layer_runs": trunk.runs,
            "layer_runs_naive": sum((trunk.depth - 1 - step) * (len(free) - step) for step in range(drop.count)),
        }
        return Decision(Surgery.drop(drop.depth, removed), scores, {"loss_without": list(scores.items())}, notes)
