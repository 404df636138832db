"""MoDeGPT: MLP channels of the highest ridge leverage, and the dimensions of heads that carry most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llmprune.arch.units import CHANNEL, KEY, VALUE
from llmprune.engine.widths import Evidence
from llmprune.methods.width.choice import Way
from llmprune.methods.width.sequential import UnitMethod, bias_name
from llmprune.solvers.groups import damped, principal
from llmprune.statistics import GRAM, MOMENTS, Stats


@dataclass(frozen=True)
class MoDeGPT(UnitMethod):
    """The units with the lowest ridge leverage go, diag(C inverse(C + a I)) with C = X'X of the writing matrix's inputs.

    Lin et al. 2024, "MoDeGPT: Modular Decomposition for Large Language Model Compression". Algorithm 1 (type I): the
    matrices before keep their rows, the one after becomes its Nystroem approximation, which is the least squares fit.
    Type II (CR), for `width.units=key-dimension`: those with the lowest |q_i| |k_i| go, norms of columns of the roots of
    Q'Q and K'K (the roots of their diagonals); pairs that rotary embedding turns together go together, by the sums of
    their squares, which no rotation changes; the query heads of a kv group have one choice and one sum of squares.
    Type III, for `width.units=value-dimension`: of each kv head the singular directions of values times outputs; those of
    the largest singular values stay. `layout=remote-code` takes all three by default, as the paper does; its amounts
    by layer are `allocation=influence`. Deviations: the paper takes a from its samples, here it is `damping` times the
    mean of C's diagonal; for type III C is that of what the attention hands to o, after it has mixed the tokens,
    summed over the query heads of a group, and least squares follow here too. kv groups are chosen by the leverage of all
    their inputs.
    """

    damping: float = 0.01

    compares: ClassVar[bool] = True
    whole: ClassVar[tuple[str, ...]] = (CHANNEL, KEY, VALUE)
    paper: ClassVar[str] = "arXiv:2408.09632"
    output: ClassVar[str] = "plain, or remote-code"
    memory: ClassVar[str] = (
        "one layer, two square matrices of its inner width in float64, and the new v, o and down matrices of all layers"
    )

    def way(self) -> Way:
        kinds = frozenset({GRAM, MOMENTS})
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
        if evidence.units.kind == KEY:
            return _compared(evidence, evidence.stats)
        if evidence.units.kind == VALUE:
            return evidence.per_unit(gram_II.diagonal()) * evidence.per_unit(
                evidence.writer_OI.double().square().sum(0)
            )
        leverage_I = torch.linalg.solve(damped(gram_II, self.damping), gram_II).diagonal()
        return evidence.per_unit(leverage_I)


def _compared(evidence: Evidence, stats: Stats) -> torch.Tensor:
    """|q| |k| of every unit: the roots of the energies of what its rows of q, and those of k, put out."""
    score_U = torch.ones(evidence.count, dtype=torch.float64, device=stats.gram_II.device)
    for member in evidence.units.members:
        weight = evidence.values[member.parameter]
        if weight.dim() == 1:  # a bias, counted with its matrix
            continue
        rows_UND = weight.movedim(member.axis, 0)[member.index_UN.to(weight.device)].double()
        energy_UN = ((rows_UND @ stats.gram_II.double()) * rows_UND).sum(2)
        bias = evidence.values.get(bias_name(member.parameter))
        if bias is not None:
            bias_UN = bias[member.index_UN.to(bias.device)].double()
            energy_UN += stats.tokens * bias_UN * (2 * rows_UND @ stats.mean_I.double() + bias_UN)
        score_U *= energy_UN.sum(1).clamp_min(0).sqrt()
    return score_U
