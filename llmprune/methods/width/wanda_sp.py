"""Wanda-sp: Wanda's score, summed over heads and channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llmprune.engine.widths import Evidence
from llmprune.methods.width.sequential import ScoredUnits
from llmprune.statistics import MOMENTS


@dataclass(frozen=True)
class WandaSP(ScoredUnits):
    """The score of an input j of o or down is |x_j| sum_i |W_ij|; that of a unit the sum over its inputs.

    An et al. 2024, "Fluctuation-based Adaptive Structured Pruning", section 5.1, where it is the baseline.
    With `compensate=least-squares` it is FASP (Hu et al. 2025).
    """

    kinds: ClassVar[frozenset[str]] = frozenset({MOMENTS})
    paper: ClassVar[str] = "arXiv:2312.11983"
    memory: ClassVar[str] = "one layer, and with compensation the new o and down matrices of all layers"

    def score(self, evidence: Evidence) -> torch.Tensor:
        assert evidence.stats is not None
        return evidence.per_unit(evidence.stats.square_sums_I.sqrt() * evidence.writer_OI.abs().sum(0))
