"""ZipLM, SlimGPT, OSSCAR: heads and channels taken out one after another, the rest of the matrix making up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmprune.engine.trunk import Trunk
from llmprune.methods.structural import TEXT, Narrow, Narrowed
from llmprune.methods.width.sequential import Way, narrow


@dataclass(frozen=True)
class GroupOBS:
    """Of each writing matrix (o, down) the group of input columns whose loss can best be made up for goes first.

    Kurtic et al. 2023, "ZipLM", eq. 2 and 3; layer by layer on what the pruned layers before put out, as in SlimGPT
    (Ling et al. 2024) and OSSCAR (Meng et al. 2024). Since the update of a set of columns does not depend on the order in
    which they went, one run gives every smaller amount, and the weights are fitted once, at the end.

    `damping`: of the Gram matrix, as a fraction of its mean diagonal. `aim`: 0 restores what the matrix would put out on
    its present inputs, 1 what it puts out in the dense model.
    """

    damping: float = 0.01
    aim: float = 0.0

    kind: ClassVar[str] = "width"
    needs: ClassVar[frozenset[str]] = frozenset({TEXT})
    patterns: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2302.04089"
    takes_list: ClassVar[bool] = False
    memory: ClassVar[str] = (
        "one layer, two square matrices of its inner width in float64, and the new o and down matrices of all layers"
    )

    def decide(self, trunk: Trunk, asked: Narrow) -> Narrowed:
        return narrow(trunk, asked, Way(None, "least-squares", damping=self.damping, aim=self.aim))
