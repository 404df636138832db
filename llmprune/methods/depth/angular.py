"""Angular distance: drop the window of layers over which the hidden state turns least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmprune.checkpoint.surgery import Surgery
from llmprune.engine.similarity import turns
from llmprune.engine.trunk import Trunk
from llmprune.methods.structural import TEXT, Decision, Drop


@dataclass(frozen=True)
class Angular:
    """The n layers from l on with the lowest d(x_l, x_{l+n}) = E arccos(cos) / pi; l = 0 is a candidate too.

    Gromov et al. 2024, "The Unreasonable Ineffectiveness of the Deeper Layers", eq. 7.

    `tokens`: "all" averages over all tokens, "last" takes the last of each sequence, as the paper does.
    """

    tokens: str = "all"

    kind: ClassVar[str] = "depth"
    needs: ClassVar[frozenset[str]] = frozenset({TEXT})
    patterns: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2403.17887"
    takes_list: ClassVar[bool] = False
    memory: ClassVar[str] = "one layer and the activations of n + 1 layers"

    def __post_init__(self) -> None:
        if self.tokens not in ("all", "last"):
            raise ValueError(f"tokens {self.tokens!r} is neither 'all' nor 'last'")

    def decide(self, trunk: Trunk, drop: Drop) -> Decision:
        found = turns(trunk, drop.count, last_token=self.tokens == "last")
        scores = dict(enumerate(found.angle))
        figures = {"angular_distance": found.angle, "similarity": found.heat}
        return Decision(Surgery.drop(drop.depth, drop.window(scores)), scores, figures)
