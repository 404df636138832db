"""BlockPruner: remove one attention or MLP at a time, each time the one that is missed least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmprune.arch.sublayers import HALVES
from llmprune.engine.search import check_halves, greedy
from llmprune.engine.trunk import Trunk
from llmprune.methods.halves import remove_parts
from llmprune.methods.structural import TEXT, Decision, Drop


@dataclass(frozen=True)
class BlockPruner:
    """Greedy on perplexity with attention and MLP as separate units; n layers count as 2 n units.

    Zhong et al. 2024, "BlockPruner: Fine-grained Pruning for Large Language Models", algorithm 1.
    """

    kind: ClassVar[str] = "depth"
    needs: ClassVar[frozenset[str]] = frozenset({TEXT})
    patterns: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2406.10594"
    takes_list: ClassVar[bool] = False
    memory: ClassVar[str] = (
        "one layer, and the activations of twice as many variants as there are layers, in chunks that fit"
    )

    def decide(self, trunk: Trunk, drop: Drop) -> Decision:
        check_halves(trunk)
        parts = [(index, half) for index in range(drop.depth) for half in HALVES]
        found = greedy(trunk, parts, 2 * drop.count)
        notes = {
            "loss_dense": found.dense,
            "removed_in_order": found.removed,
            "loss_after_each": found.losses,
        }
        return Decision(remove_parts(trunk, found.removed), dict(found.first), {}, notes)
