"""K-Prune: the heads and channels in which the model keeps least of what it knows, and weights that restore the rest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from llmprune.engine.gradients import squared_gates
from llmprune.engine.trunk import Trunk
from llmprune.engine.widths import Evidence
from llmprune.methods.structural import Narrow, Narrowed
from llmprune.methods.width.choice import Way
from llmprune.methods.width.sequential import UnitMethod, given, narrow
from llmprune.solvers.groups import own_energy
from llmprune.statistics import GRAM

TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class KPrune(UnitMethod):
    """A unit's score is its share of the predictive knowledge and `balance` times that of the representational one.

    Park et al. 2024, "Accurate Retraining-free Pruning for Pretrained Encoder-based Language Models" (arXiv:2308.03449):
    predictive is how far the model's predictions move without the unit, to second order (dL/dm)² in a gate m on it;
    representational is how far the output of its attention or MLP moves, |x_u W_u'|² over the tokens. Half a layer
    after the other, what stays is fitted to what the dense model puts out there, on the inputs that the pruned one gives.
    Deviations: in the dense model the gradient of the divergence itself is zero, so L is the likelihood of tokens that
    the model itself draws, whose mean square is the divergence's curvature; it is measured once, not again for every
    half; both kinds of knowledge are shares of their sums over the units of a layer, so `balance` has no unit; how many
    units of every layer go is `allocation`.

    `damping`: of the fit, as a fraction of the mean diagonal of the Gram matrix. `seed`: of the tokens drawn.
    """

    balance: float = 1.0
    damping: float = 0.01
    seed: int = 0

    paper: ClassVar[str] = "arXiv:2308.03449"
    memory: ClassVar[str] = (
        "one layer and its activations for one batch; what enters every layer, for all tokens; the new o and down matrices of "
        "all layers"
    )

    def __post_init__(self) -> None:
        if self.balance < 0:
            raise ValueError(f"balance {self.balance} must be at least 0")

    def way(self) -> Way:
        return Way(None, "least-squares", damping=self.damping, aim=1.0, kinds=frozenset({GRAM}))

    def decide(self, trunk: Trunk, asked: Narrow) -> Narrowed:
        generator = torch.Generator(trunk.batches[0]["input_ids"].device).manual_seed(self.seed)

        def drawn(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            """The tokens with, in place of each next one, one that the model expects there."""
            chances = logits[:, :-1].float().softmax(-1).flatten(0, 1)
            next_T = torch.multinomial(chances, 1, generator=generator)
            return torch.cat([ids[:, :1], next_T.view(len(ids), -1)], 1)

        predictive = squared_gates(trunk, asked.units.values(), drawn)

        known = given(predictive)

        def score(evidence: Evidence) -> torch.Tensor:
            assert evidence.stats is not None
            known_U = known(evidence)
            put_out_U = own_energy(evidence.writer_OI, evidence.stats.gram_II, evidence.columns_UN).cpu()
            return _shares(known_U) + self.balance * _shares(put_out_U)

        return narrow(trunk, asked, replace(self.way(), score=score))


def _shares(value_U: torch.Tensor) -> torch.Tensor:
    return value_U / value_U.sum().clamp_min(TINY)
