"""Minitron: heads and channels by how active they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llmprune.engine.trunk import Trunk
from llmprune.engine.widths import Evidence
from llmprune.methods.structural import TEXT, Narrow, Narrowed
from llmprune.methods.width.sequential import Way, narrow
from llmprune.statistics import MOMENTS


@dataclass(frozen=True)
class Minitron:
    """The score of a unit is the root mean square of what it puts out over all calibration tokens of the dense model.

    Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation", section 2.2. The paper
    takes the mean of absolute values over a sequence before the L2 norm over the batch; here every token counts alike.
    On text of one domain this is contextual pruning (Valicenti et al. 2023, "Mini-GPTs").

    `compensate`: none, bias or least-squares.
    """

    compensate: str = "none"

    kind: ClassVar[str] = "width"
    needs: ClassVar[frozenset[str]] = frozenset({TEXT})
    patterns: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2407.14679"
    takes_list: ClassVar[bool] = False
    memory: ClassVar[str] = "one layer, and with compensation the new o and down matrices of all layers"

    def __post_init__(self) -> None:
        self._way()

    def decide(self, trunk: Trunk, asked: Narrow) -> Narrowed:
        return narrow(trunk, asked, self._way())

    def _way(self) -> Way:
        return Way(self.score, self.compensate, pruned=False, kinds=frozenset({MOMENTS}))

    def score(self, evidence: Evidence) -> torch.Tensor:
        assert evidence.stats is not None
        return (evidence.per_unit(evidence.stats.square_sums_I) / evidence.stats.tokens).sqrt()
