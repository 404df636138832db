"""Bonsai: heads and channels by what forward passes without random sets of them say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from llmprune.checkpoint.slicing import Place
from llmprune.engine.gates import gated
from llmprune.engine.trunk import Trunk, token_losses
from llmprune.methods.structural import Narrow
from llmprune.methods.width.choice import lowest
from llmprune.methods.width.minitron import Minitron
from llmprune.methods.width.sequential import ModelScores, scores_of
from llmprune.solvers.groups import ridge
from llmprune.types import UserError


@dataclass(frozen=True)
class Bonsai(ModelScores):
    """Switch off random halves of the least active units, and regress the loss on which were off.

    Dery et al. 2024, "Everybody Prune Now: Structured Pruning of LLMs with only Forward Passes", section 3. Candidates
    are twice as many units of a place as go, those with the lowest activations; masks come in complementary pairs.
    All goes in one round here (the paper takes 5 % at a time), and the regression is ridge.

    `masks`: how many forward passes over `sequences` calibration sequences. `penalty`: of the regression, relative to the
    number of masks.
    """

    masks: int = 200
    sequences: int = 32
    penalty: float = 0.1
    seed: int = 0

    paper: ClassVar[str] = "arXiv:2402.05406"
    memory: ClassVar[str] = "the model, forward only"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.masks < 2 or self.masks % 2:
            raise ValueError(f"masks {self.masks} must be even and at least 2: they come in complementary pairs")

    def check(self, model: PreTrainedModel, asked: Narrow) -> None:
        super().check(model, asked)
        if asked.scored:
            raise UserError("bonsai needs to know how many units of each layer go; use allocation=uniform or rising")

    def scores(self, trunk: Trunk, asked: Narrow) -> dict[Place, torch.Tensor]:
        # how much higher the loss is without each candidate; all others score above them
        prior = scores_of(trunk, asked, Minitron().way())
        counts = asked.spread({})
        candidates = {
            place: torch.tensor(lowest(prior[place], min(2 * counts[place], one.count), one.strata))
            for place, one in asked.units.items()
            if counts[place]
        }
        off_MC = self._draw(sum(map(len, candidates.values())))
        losses_M = self._losses(trunk.first(self.sequences), asked, candidates, off_MC)
        centred_MC = off_MC - off_MC.mean(0)
        system_CC = centred_MC.T @ centred_MC
        system_CC.diagonal().add_(self.penalty * self.masks)
        effect_C = ridge(system_CC, (centred_MC.T @ (losses_M - losses_M.mean()))[:, None])[:, 0]
        scores = {place: torch.full((one.count,), torch.inf) for place, one in asked.units.items()}
        for (place, chosen), effect in zip(
            candidates.items(), effect_C.split([len(one) for one in candidates.values()]), strict=True
        ):
            scores[place][chosen] = effect.float()
        return scores

    def _draw(self, count: int) -> torch.Tensor:
        """Masks x candidates: 1 where a candidate is off, in complementary pairs."""
        generator = torch.Generator().manual_seed(self.seed)
        half = (torch.rand(self.masks // 2, count, generator=generator, dtype=torch.float64) < 0.5).double()
        return torch.cat([half, 1 - half])

    def _losses(
        self, trunk: Trunk, asked: Narrow, candidates: dict[Place, torch.Tensor], off_MC: torch.Tensor
    ) -> torch.Tensor:
        losses = []
        with trunk.loaded(*range(trunk.depth)):
            for off_C in off_MC:
                gates = {place: torch.ones(one.count) for place, one in asked.units.items()}
                parts = off_C.split([len(one) for one in candidates.values()])
                for (place, chosen), off in zip(candidates.items(), parts, strict=True):
                    gates[place][chosen] = 1 - off.float()
                gates = {place: gate.to(trunk.batches[0]["input_ids"].device) for place, gate in gates.items()}
                with gated(trunk.model, asked.units.values(), gates):
                    found = [
                        token_losses(trunk.model(**one, use_cache=False).logits, one["input_ids"]).flatten()
                        for one in trunk.batches
                    ]
                losses.append(float(torch.cat(found).mean()))
        return torch.tensor(losses, dtype=torch.float64)
