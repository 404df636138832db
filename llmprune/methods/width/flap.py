"""FLAP: what fluctuates least is replaced by its mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llmprune.engine.trunk import Trunk
from llmprune.engine.widths import Evidence
from llmprune.methods.structural import TEXT, Narrow, Narrowed
from llmprune.methods.width.sequential import HEADS, Way, narrow
from llmprune.statistics import MOMENTS


@dataclass(frozen=True)
class FLAP:
    """The score of an input j of o or down is Var(x_j) |W_:j|^2, squared in attention; of a unit the mean over its inputs.

    An et al. 2024, "Fluctuation-based Adaptive Structured Pruning for Large Language Models", eq. 5 to 8. Statistics are
    those of the dense model, as in the reference; the variance is exact, where the reference's leaves out a batch. With
    `allocation: pooled` the amount is spread as published, by the true cost of a unit.

    `compensate`: "bias" as published (a class without these biases is refused), least-squares or none.
    """

    compensate: str = "bias"

    kind: ClassVar[str] = "width"
    needs: ClassVar[frozenset[str]] = frozenset({TEXT})
    patterns: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2312.11983"
    takes_list: ClassVar[bool] = False
    memory: ClassVar[str] = "one layer"

    def __post_init__(self) -> None:
        self._way()

    def decide(self, trunk: Trunk, asked: Narrow) -> Narrowed:
        return narrow(trunk, asked, self._way())

    def _way(self) -> Way:
        return Way(self.score, self.compensate, pruned=False, kinds=frozenset({MOMENTS}))

    def score(self, evidence: Evidence) -> torch.Tensor:
        assert evidence.stats is not None
        score_I = evidence.stats.variance_I * evidence.writer_OI.square().sum(0)
        score_I = score_I.square() if evidence.units.kind in HEADS else score_I
        return evidence.per_unit(score_I) / evidence.columns_UN.shape[1]
