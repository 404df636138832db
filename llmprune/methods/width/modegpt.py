"""MoDeGPT: MLP channels of the highest ridge leverage, and the principal directions of what heads hand on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llmprune.arch.units import VALUE
from llmprune.engine.widths import Evidence
from llmprune.methods.width.sequential import UnitMethod, Way
from llmprune.solvers.groups import damped, principal
from llmprune.statistics import GRAM


@dataclass(frozen=True)
class MoDeGPT(UnitMethod):
    """The units with the lowest ridge leverage go, diag(C inverse(C + a I)) with C = X'X of the writing matrix's inputs.

    Lin et al. 2024, "MoDeGPT: Modular Decomposition for Large Language Model Compression". Algorithm 1 (type I): the
    matrices before keep their rows, the one after becomes its Nystroem approximation, which is the least squares fit.
    Type III, for `width.units=value-dimension`: of each kv head the singular directions of values times outputs; those of
    the largest singular values stay. Deviations: the paper takes a from its samples, here it is `damping` times the
    mean of C's diagonal; for type III C is that of what the attention hands to o, after it has mixed the tokens,
    summed over the query heads of a group, and least squares follow here too. kv groups are chosen by the leverage of all
    their inputs. The paper's type II, fewer query and key dimensions, and its amounts by block influence are not here.
    """

    damping: float = 0.01

    paper: ClassVar[str] = "arXiv:2408.09632"
    output: ClassVar[str] = "plain, or remote-code"
    memory: ClassVar[str] = (
        "one layer, two square matrices of its inner width in float64, and the new v, o and down matrices of all layers"
    )

    def way(self) -> Way:
        kinds = frozenset({GRAM})
        return Way(self.score, "least-squares", damping=self.damping, kinds=kinds, basis=self.value_basis)

    def value_basis(self, evidence: Evidence) -> torch.Tensor:
        """The singular directions of every kv head, head by head, as columns: G x h x h."""
        assert evidence.stats is not None
        columns_GHR = evidence.columns_UN.unflatten(0, (evidence.strata, -1))
        gram_II = evidence.stats.gram_II.double() / evidence.stats.tokens
        return torch.stack(
            [
                principal(
                    damped(torch.stack([gram_II[one][:, one] for one in columns_HR.T]).sum(0), self.damping),
                    torch.cat([evidence.writer_OI[:, one] for one in columns_HR.T]).double(),
                )
                for columns_HR in columns_GHR
            ]
        )

    def score(self, evidence: Evidence) -> torch.Tensor:
        """The ridge leverage of every unit: how much of each input the others could not tell; of values, their energy."""
        assert evidence.stats is not None
        gram_II = evidence.stats.gram_II.double()
        if evidence.units.kind == VALUE:
            return evidence.per_unit(gram_II.diagonal()) * evidence.per_unit(
                evidence.writer_OI.double().square().sum(0)
            )
        leverage_I = torch.linalg.solve(damped(gram_II, self.damping), gram_II).diagonal()
        return evidence.per_unit(leverage_I)
