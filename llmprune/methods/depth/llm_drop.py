"""LLM-Drop: remove the attentions, MLPs or both that change the hidden state least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmprune.arch.sublayers import ATTENTION, HALVES, MLP
from llmprune.engine.search import Part, check_halves, run_without
from llmprune.engine.similarity import distance
from llmprune.engine.trunk import Trunk
from llmprune.methods.halves import remove_parts
from llmprune.methods.structural import TEXT, Decision, Drop


@dataclass(frozen=True)
class LLMDrop:
    """1 - cos(u, u + f(norm(u))) of every attention and MLP f; the n lowest go at once.

    He et al. 2024, "What Matters in Transformers? Not All Attention is Needed", eq. 2 and section 3.3.

    `half`: "attention" or "mlp" removes that half of n layers; "joint" the 2 n lowest of both.
    """

    half: str = ATTENTION

    kind: ClassVar[str] = "depth"
    needs: ClassVar[frozenset[str]] = frozenset({TEXT})
    patterns: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2406.15786"
    takes_list: ClassVar[bool] = False
    memory: ClassVar[str] = "one layer and its activations"

    def __post_init__(self) -> None:
        if self.half not in (*HALVES, "joint"):
            raise ValueError(f"half {self.half!r} is none of attention, mlp, joint")

    def decide(self, trunk: Trunk, drop: Drop) -> Decision:
        check_halves(trunk)
        scores: dict[Part, float] = {}
        states = trunk.enter()
        for index in range(trunk.depth):
            with trunk.loaded(index):
                # without its MLP the layer puts out what the MLP gets to see
                between = run_without(trunk, index, states, {(index, MLP)})
                after = trunk.run(index, states)
            scores[index, ATTENTION] = distance(states, between)
            scores[index, MLP] = distance(between, after)
            states = after
        asked = {part: one for part, one in scores.items() if self.half in (part[1], "joint")}
        count = 2 * drop.count if self.half == "joint" else drop.count
        removed = sorted(asked, key=lambda part: (asked[part], part))[:count]
        return Decision(remove_parts(trunk, removed), dict(scores), {}, {"removed": removed})
