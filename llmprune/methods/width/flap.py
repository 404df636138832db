"""FLAP: what fluctuates least is replaced by its mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llmprune.engine.widths import Evidence
from llmprune.methods.width.sequential import HEADS, ScoredUnits
from llmprune.statistics import MOMENTS


@dataclass(frozen=True)
class FLAP(ScoredUnits):
    """The score of an input j of o or down is Var(x_j) |W_:j|^2, squared in attention; of a unit the mean over its inputs.

    An et al. 2024, "Fluctuation-based Adaptive Structured Pruning for Large Language Models", eq. 5 to 8. Statistics are
    those of the dense model, as in the reference; the variance is exact, where the reference's leaves out a batch. With
    `allocation: pooled` the amount is spread as published, by the true cost of a unit.

    `compensate`: "bias" as published; a class without these biases is refused.
    """

    compensate: str = "bias"

    kinds: ClassVar[frozenset[str]] = frozenset({MOMENTS})
    pruned: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv:2312.11983"
    memory: ClassVar[str] = "one layer"

    def score(self, evidence: Evidence) -> torch.Tensor:
        assert evidence.stats is not None
        score_I = evidence.stats.variance_I * evidence.writer_OI.square().sum(0)
        score_I = score_I.square() if evidence.units.kind in HEADS else score_I
        return evidence.per_unit(score_I) / evidence.columns_UN.shape[1]
