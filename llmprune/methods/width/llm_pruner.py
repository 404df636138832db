"""LLM-Pruner: heads, channels and dimensions of the hidden state by a Taylor expansion of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from llmprune.arch.units import Units
from llmprune.checkpoint.slicing import HIDDEN, Place
from llmprune.engine.gradients import loss_gradients
from llmprune.engine.trunk import Trunk
from llmprune.engine.widths import evidences, slices
from llmprune.methods.structural import Narrow
from llmprune.methods.width.sequential import ModelScores
from llmprune.types import Gradient

SQUARES = ("second", "mixed")


@dataclass(frozen=True)
class LLMPruner(ModelScores):
    """The units whose removal changes the loss least, to first or second order in the weights.

    Ma et al. 2023, "LLM-Pruner: On the Structural Pruning of Large Language Models", eq. 3 to 5. With g the gradient of
    the mean loss and h the mean of the squared gradients of single sequences, a slice scores by `taylor`: "vector"
    |sum w g|, "first" sum |w g|, "second" sum w^2 h, "mixed" sum |w g - w^2 h / 2|; a unit is the sum of its slices in
    all matrices. The query heads of a kv group are those that read it, which the reference's script mistakes. With
    `width.units=residual` it is the channel-wise mode: slices of embeddings, norms and head count as well.
    """

    taylor: str = "first"

    scores_hidden: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:2305.11627"
    memory: ClassVar[str] = (
        "one layer and its gradients (three times its weights, in float32); what enters every layer, for all tokens"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.taylor not in ("vector", "first", *SQUARES):
            raise ValueError(f"taylor {self.taylor!r} is none of vector, first, second, mixed")

    def scores(self, trunk: Trunk, asked: Narrow) -> dict[Place, torch.Tensor]:
        # a square is of a sequence's own gradient
        trunk = trunk.rows() if self.taylor in SQUARES else trunk
        hidden = asked.units.get(HIDDEN)
        found: dict[Place, torch.Tensor] = {}
        if hidden is not None:
            found[HIDDEN] = torch.zeros(hidden.count, dtype=torch.float64)
        prefixes = [unit.prefix for unit in trunk.units]
        counted = {one.parameter for units in asked.units.values() for one in units.members}
        inside = [
            [name.removeprefix(prefix) for name in sorted(counted) if name.startswith(prefix)] for prefix in prefixes
        ]
        outside = sorted(name for name in counted if not name.startswith(tuple(prefixes)))
        for index, gradients in loss_gradients(trunk, inside, outside):
            prefix = prefixes[index] if index >= 0 else ""
            changes = {
                prefix + name: self._change(trunk.model.get_parameter(prefix + name).detach(), one)
                for name, one in gradients.items()
            }
            for place, units in asked.units.items():
                if place[0] == index:
                    parts = (self._sum(list(one.weights())) for one in evidences(units, {}, changes))
                    found[place] = torch.cat(list(parts)).cpu()
            if hidden is not None:
                found[HIDDEN] += self._of_hidden(hidden, changes)
        return found

    def _of_hidden(self, hidden: Units, changes: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What the parameters at hand contribute to the scores of dimensions of the hidden state."""
        return self._sum(list(slices(hidden, changes))).double().cpu()

    def _change(self, weight: torch.Tensor, gradient: Gradient) -> torch.Tensor:
        """The terms of the expansion, one an entry."""
        first = weight.float() * gradient.mean_OI
        if self.taylor not in SQUARES:
            return first
        second = weight.float().square() * gradient.squares_OI / gradient.samples
        return second if self.taylor == "second" else first - second / 2

    def _sum(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Of the slices of each unit, units x slices x entries for every parameter."""
        rows = (one.sum(2).abs() if self.taylor == "vector" else one.abs().sum(2) for one in parts)
        return torch.stack([one.sum(1) for one in rows]).sum(0)
