"""Which units of some evidence go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from llmprune.engine.trunk import Trunk
from llmprune.engine.widths import Evidence
from llmprune.methods.structural import Narrow
from llmprune.solvers.groups import damped, eliminate, unlike
from llmprune.statistics import DRIFT, GRAM, MOMENTS
from llmprune.types import UserError

# The scores of the units of some evidence: those with the lowest go.
Score: TypeAlias = Callable[[Evidence], torch.Tensor]
# The writing matrix of some evidence, its outputs turned and scaled so that their squared errors count alike.
Weigh: TypeAlias = Callable[[Evidence], torch.Tensor]


@dataclass(frozen=True)
class Way:
    """How units are chosen and made up for.

    `score`: of the units; None: OBS chooses them one after another. `compensate`: what the writing matrix does for what
    it loses: nothing, a bias, or the least squares fit of the columns that stay. `pruned`: whether a layer sees what
    the pruned layers before it put out, or what the dense ones did. `aim`, 0 to 1: how far the matrix aims at what it
    puts out in the dense model. `kinds`: statistics that `score` reads. `unique`: scores are multiplied by `unlike`.
    `weigh`: for OBS, where errors of some outputs count more than those of others. `hidden`: the scores of dimensions of the
    hidden state in the dense model, of a method that has such. `basis`: a new basis for the value dimensions of each kv
    head, in which they are chosen.
    """

    score: Score | None
    compensate: str = "none"
    pruned: bool = True
    damping: float = 0.01
    aim: float = 0.0
    kinds: frozenset[str] = frozenset()
    unique: bool = False
    weigh: Weigh | None = None
    hidden: Callable[[Trunk, Narrow], torch.Tensor] | None = None
    basis: Callable[[Evidence], torch.Tensor] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.damping <= 1:
            raise UserError(f"damping {self.damping} must lie between 0 and 1")
        if not 0 <= self.aim <= 1:
            raise UserError(f"aim {self.aim} must lie between 0 and 1")

    @property
    def reads(self) -> frozenset[str]:
        """The statistics that are needed."""
        gram = self.score is None or self.compensate == "least-squares" or self.unique
        extra = {GRAM: gram, DRIFT: self.aim > 0, MOMENTS: self.compensate == "bias"}
        return self.kinds | {kind for kind, wanted in extra.items() if wanted}


def choose(evidence: Evidence, count: int, way: Way) -> tuple[list[int], torch.Tensor]:
    """The units that go, and the scores of all."""
    if evidence.stats is None and way.reads:
        # no token came by: what is left to go by is the size of the weights
        score_U = torch.stack([rows.square().sum((1, 2)) for rows in evidence.weights()]).sum(0)
        return lowest(score_U, count, evidence.strata), score_U
    if way.score is not None:
        score_U = way.score(evidence)
        if way.unique:
            assert evidence.stats is not None
            score_U = score_U * unlike(evidence.stats.gram_II, evidence.columns_UN).to(score_U)
        return lowest(score_U, count, evidence.strata), score_U
    assert evidence.stats is not None
    system_II = damped(evidence.stats.gram_II, way.damping)
    writer_OI = evidence.writer_OI if way.weigh is None else way.weigh(evidence)
    trace = eliminate(writer_OI, system_II, evidence.columns_UN, count, evidence.strata)
    score_U = torch.full((evidence.count,), float("inf"), dtype=torch.float64)
    score_U[trace.order] = torch.tensor(trace.losses, dtype=torch.float64).cummax(0).values
    return trace.order, score_U.nan_to_num(posinf=max(trace.losses, default=0.0))


def lowest(score_U: torch.Tensor, count: int, strata: int = 1) -> list[int]:
    """The units with the lowest scores, as many from each of `strata` runs, ties to the lowest number."""
    runs_SU = score_U.double().view(strata, -1)
    order_SU = runs_SU.argsort(dim=1, stable=True)[:, : count // strata]
    return (order_SU + torch.arange(strata, device=order_SU.device)[:, None] * runs_SU.shape[1]).flatten().tolist()
