"""Shortened LLaMA: one-shot depth pruning by perplexity or by a Taylor expansion of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmprune.checkpoint.surgery import Surgery
from llmprune.engine.gradients import saliency
from llmprune.engine.search import WHOLE, losses_without
from llmprune.engine.trunk import Trunk
from llmprune.methods.structural import TEXT, Decision, Drop


@dataclass(frozen=True)
class ShortenedLlama:
    """Drop the layers with the lowest scores, all at once.

    Kim et al. 2024, "Shortened LLaMA: Depth Pruning for Large Language Models with Comparison of Retraining
    Methods", section 3.2.

    `score`: "ppl" is the perplexity of the model without the layer (one layer and the activations of all variants
    in memory); "taylor" the sum of |w g| over its matrices, where g is the gradient of the loss ("Taylor+"; one
    layer with its gradients, and what enters every layer). `protect_first`, `protect_last`: layers that always stay;
    the paper's + variants keep the first four and the last two.
    """

    score: str = "ppl"
    protect_first: int = 4
    protect_last: int = 2

    kind: ClassVar[str] = "depth"
    needs: ClassVar[frozenset[str]] = frozenset({TEXT})
    patterns: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2402.02834"
    takes_list: ClassVar[bool] = False
    memory: ClassVar[str] = (
        "score=ppl: one layer, activations of all variants; score=taylor: one layer, its gradients, all layers' inputs"
    )

    def __post_init__(self) -> None:
        if self.score not in ("ppl", "taylor"):
            raise ValueError(f"score {self.score!r} is neither 'ppl' nor 'taylor'")

    def decide(self, trunk: Trunk, drop: Drop) -> Decision:
        free = drop.unprotected(self.protect_first, self.protect_last)
        if self.score == "ppl":
            losses, _ = losses_without(trunk, [(index, WHOLE) for index in free], set())
            scores = {index: loss for (index, _), loss in losses.items()}
        else:
            scores = {index: one for index, one in enumerate(saliency(trunk)) if index in free}
        return Decision(Surgery.drop(drop.depth, drop.lowest(scores)), scores)
