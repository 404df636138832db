"""ShortGPT: drop the layers that turn the hidden state least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmprune.checkpoint.surgery import Surgery
from llmprune.engine.similarity import turns
from llmprune.engine.trunk import Trunk
from llmprune.methods.structural import TEXT, Decision, Drop


@dataclass(frozen=True)
class ShortGPT:
    """Block influence BI_l = 1 - E cos(x_l, x_{l+1}); the lowest go at once.

    Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", eq. 1.
    The output of the last layer is taken before the final norm.
    """

    kind: ClassVar[str] = "depth"
    needs: ClassVar[frozenset[str]] = frozenset({TEXT})
    patterns: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2403.03853"
    takes_list: ClassVar[bool] = False
    memory: ClassVar[str] = "one layer and its activations"

    def decide(self, trunk: Trunk, drop: Drop) -> Decision:
        found = turns(trunk, 1)
        scores = dict(enumerate(found.cosine_distance))
        surgery = Surgery.drop(drop.depth, drop.lowest(scores))
        return Decision(surgery, scores, {"block_influence": found.cosine_distance, "similarity": found.heat})
