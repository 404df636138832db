"""Wanda-sp: Wanda's score, summed over heads and channels."""

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
class WandaSP:
    """The score of an input j of o or down is |x_j| sum_i |W_ij|; that of a unit the sum over its inputs.

    An et al. 2024, "Fluctuation-based Adaptive Structured Pruning", section 5.1, where it is the baseline.
    `compensate`: none, bias or least-squares (with which it is FASP, Hu et al. 2025).
    """

    compensate: str = "none"

    kind: ClassVar[str] = "width"
    needs: ClassVar[frozenset[str]] = frozenset({TEXT})
    patterns: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2312.11983"
    takes_list: ClassVar[bool] = False
    memory: ClassVar[str] = "one layer, and with compensation the new o and down matrices of all layers"

    def __post_init__(self) -> None:
        self._way()

    def decide(self, trunk: Trunk, asked: Narrow) -> Narrowed:
        return narrow(trunk, asked, self._way())

    def _way(self) -> Way:
        return Way(self.score, self.compensate, kinds=frozenset({MOMENTS}))

    def score(self, evidence: Evidence) -> torch.Tensor:
        assert evidence.stats is not None
        return evidence.per_unit(evidence.stats.square_sums_I.sqrt() * evidence.writer_OI.abs().sum(0))
