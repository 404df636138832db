"""MoDeGPT, its first part: the MLP channels with the highest ridge leverage, and a Nystroem fit of the writing matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llmprune.engine.widths import Evidence
from llmprune.methods.width.sequential import UnitMethod, Way
from llmprune.solvers.groups import damped
from llmprune.statistics import GRAM


@dataclass(frozen=True)
class MoDeGPT(UnitMethod):
    """The units with the lowest ridge leverage go, diag(C inverse(C + a I)) with C = X'X of the writing matrix's inputs.

    Lin et al. 2024, "MoDeGPT: Modular Decomposition for Large Language Model Compression", algorithm 1 (type I): the
    matrices before keep their rows, the one after becomes its Nystroem approximation, which is the least squares fit.
    Deviations: the paper takes a from its samples, here it is `damping` times the mean of C's diagonal; kv groups are
    chosen likewise, by the leverage of all their inputs, since the paper's factors of queries and keys (type II) and of
    values and outputs (type III) need attentions of other shapes than any class has; `width.units=channel` leaves the
    attention alone. The paper's amounts by block influence are an allocation, not part of this.
    """

    damping: float = 0.01

    paper: ClassVar[str] = "arXiv:2408.09632"
    memory: ClassVar[str] = (
        "one layer, two square matrices of its inner width in float64, and the new o and down matrices of all layers"
    )

    def way(self) -> Way:
        return Way(self.score, "least-squares", damping=self.damping, kinds=frozenset({GRAM}))

    def score(self, evidence: Evidence) -> torch.Tensor:
        """The ridge leverage of every unit: how much of each input the others could not tell."""
        assert evidence.stats is not None
        gram_II = evidence.stats.gram_II.double()
        leverage_I = torch.linalg.solve(damped(gram_II, self.damping), gram_II).diagonal()
        return evidence.per_unit(leverage_I)
