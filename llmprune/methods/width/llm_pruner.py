"""LLM-Pruner: heads and channels by a Taylor expansion of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from llmprune.engine.gradients import backward, differentiated, sequences
from llmprune.engine.trunk import Trunk
from llmprune.engine.widths import evidences
from llmprune.methods.structural import TEXT, Narrow, Narrowed
from llmprune.methods.width.sequential import Way, given, narrow

SQUARES = ("second", "mixed")


@dataclass(frozen=True)
class LLMPruner:
    """The units whose removal changes the loss least, to first or second order in the weights.

    Ma et al. 2023, "LLM-Pruner: On the Structural Pruning of Large Language Models", eq. 3 to 5. With g the gradient of
    the mean loss and h the mean of the squared gradients of single sequences, a slice scores by `taylor`: "vector"
    |sum w g|, "first" sum |w g|, "second" sum w^2 h, "mixed" sum |w g - w^2 h / 2|; a unit is the sum of its slices in
    all matrices. The query heads of a kv group are those that read it, which the reference's script mistakes.

    `compensate`: none as published, or least-squares.
    """

    taylor: str = "first"
    compensate: str = "none"

    kind: ClassVar[str] = "width"
    needs: ClassVar[frozenset[str]] = frozenset({TEXT})
    patterns: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2305.11627"
    takes_list: ClassVar[bool] = False
    memory: ClassVar[str] = (
        "the model, the gradients of its layers, for taylor=second and mixed their squares in float32 too, and the "
        "activations of one batch"
    )

    def __post_init__(self) -> None:
        if self.taylor not in ("vector", "first", *SQUARES):
            raise ValueError(f"taylor {self.taylor!r} is none of vector, first, second, mixed")
        Way(None, self.compensate)

    def decide(self, trunk: Trunk, asked: Narrow) -> Narrowed:
        return narrow(trunk, asked, Way(given(self.scores(trunk, asked)), self.compensate))

    def scores(self, trunk: Trunk, asked: Narrow) -> dict[tuple[int | None, str], torch.Tensor]:
        """The score of every unit, by place."""
        names = {member.parameter for one in asked.units.values() for member in one.members if not member.norm}
        with trunk.loaded(*range(trunk.depth)):
            parameters = {name: trunk.model.get_parameter(name) for name in sorted(names)}
            with differentiated(list(parameters.values())):
                squares = self._run(trunk, parameters)
                found = {}
                for place, units in asked.units.items():
                    own = {one.parameter: parameters[one.parameter] for one in units.members if not one.norm}
                    changes = {name: self._change(one, squares.get(name)) for name, one in own.items()}
                    parts = (
                        torch.stack([self._sum(rows) for rows in one.weights()]).sum(0)
                        for one in evidences(units, {}, changes)
                    )
                    found[place] = torch.cat(list(parts))
        return found

    def _run(self, trunk: Trunk, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        """Fill in the gradients; returns the mean squares of those of single sequences where they are needed."""
        if self.taylor not in SQUARES:
            backward(trunk, trunk.batches)
            return {}
        squares = {name: torch.zeros_like(one, dtype=torch.float32) for name, one in parameters.items()}
        sums = {name: torch.zeros_like(one, dtype=torch.float32) for name, one in parameters.items()}
        rows = list(sequences(trunk))
        for row in rows:
            backward(trunk, [row])
            for name, one in parameters.items():
                if one.grad is not None:
                    squares[name].add_(one.grad.float().square() / len(rows))
                    sums[name].add_(one.grad.float() / len(rows))
                    one.grad = None
        for name, one in parameters.items():
            one.grad = sums[name].to(one.dtype)
        return squares

    def _change(self, weight: nn.Parameter, square: torch.Tensor | None) -> torch.Tensor:
        """The terms of the expansion, one an entry."""
        value = weight.detach().float()
        first = value * weight.grad.float() if weight.grad is not None else torch.zeros_like(value)
        if square is None:
            return first
        second = value.square() * square
        return second if self.taylor == "second" else first - second / 2

    def _sum(self, rows_UNK: torch.Tensor) -> torch.Tensor:
        rows_UN = rows_UNK.sum(2).abs() if self.taylor == "vector" else rows_UNK.abs().sum(2)
        return rows_UN.sum(1)
