"""Group Fisher: heads and channels by the squared gradient of a gate on each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llmprune.checkpoint.slicing import Place
from llmprune.engine.gradients import squared_gates
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
    memory: ClassVar[str] = "one layer and its activations for one batch; what enters every layer, for all tokens"

    def scores(self, trunk: Trunk, asked: Narrow) -> dict[Place, torch.Tensor]:
        return squared_gates(trunk, asked.units.values())
