"""Group Fisher: heads and channels by the squared gradient of a gate on each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from llmprune.engine.gates import check_gates, squared_gradients
from llmprune.engine.trunk import Trunk
from llmprune.methods.structural import Narrow
from llmprune.methods.width.sequential import ModelScores


@dataclass(frozen=True)
class GroupFisher(ModelScores):
    """The score of a unit is the sum over sequences of (dL / dm)^2, m being a factor on what it puts out.

    Liu et al. 2021, "Group Fisher Pruning for Practical Network Compression", eq. 4: the diagonal of the Fisher matrix of
    the gates; also the first step of Kwon et al. 2022, whose mask tuning is `compensate=least-squares`.
    """

    paper: ClassVar[str] = "arXiv:2108.00708"
    memory: ClassVar[str] = "the model, and the activations of one batch in all layers; no gradients of weights"

    def check(self, model: PreTrainedModel, asked: Narrow) -> None:
        super().check(model, asked)
        check_gates(model, asked.units.values())

    def scores(self, trunk: Trunk, asked: Narrow) -> dict[tuple[int | None, str], torch.Tensor]:
        with trunk.loaded(*range(trunk.depth)):
            return squared_gradients(trunk, asked.units)
