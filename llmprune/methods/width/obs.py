"""ZipLM, SlimGPT, OSSCAR: heads and channels taken out one after another, the rest of the matrix making up."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from llmprune.engine.trunk import Trunk
from llmprune.methods.structural import Narrow, Narrowed
from llmprune.methods.width.choice import Way
from llmprune.methods.width.levels import searched
from llmprune.methods.width.sequential import UnitMethod


@dataclass(frozen=True)
class GroupOBS(UnitMethod):
    """Of each writing matrix (o, down) the group of input columns whose loss can best be made up for goes first.

    Kurtic et al. 2023, "ZipLM", eq. 2 and 3; SlimGPT (Ling et al. 2024) and OSSCAR (Meng et al. 2024) do so
    layer after layer. Since the update of a set of columns does not depend on the order in
    which they went, one run gives every smaller amount, and the weights are fitted once, at the end.

    `damping`: of the Gram matrix, as a fraction of its mean diagonal. `aim`: 0 restores what the matrix would put out on
    its present inputs, 1 what it puts out in the dense model. `stream`: a layer sees what the "pruned" layers before it put
    out (SlimGPT, OSSCAR), or the "dense" ones (ZipLM).
    """

    damping: float = 0.01
    aim: float = 0.0
    stream: str = "pruned"

    searches: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:2302.04089"
    memory: ClassVar[str] = (
        "one layer, two square matrices of its inner width in float64, and the new o and down matrices of all layers"
    )

    def __post_init__(self) -> None:
        if self.stream not in ("pruned", "dense"):
            raise ValueError(f"stream {self.stream!r} is neither 'pruned' nor 'dense'")

    def decide(self, trunk: Trunk, asked: Narrow) -> Narrowed:
        if asked.search is None:
            return super().decide(trunk, asked)
        counts, notes = searched(trunk, asked, self.way())
        found = super().decide(trunk, replace(asked, spread=lambda _: counts, scored=False))
        found.notes["search"] = notes
        return found

    def way(self) -> Way:
        return Way(None, "least-squares", self.stream == "pruned", self.damping, self.aim)
