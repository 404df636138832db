"""Group Fisher: heads and channels by the squared gradient of a gate on each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llmprune.engine.gates import check_gates, gated
from llmprune.engine.gradients import backward
from llmprune.engine.trunk import Trunk
from llmprune.methods.structural import TEXT, Narrow, Narrowed
from llmprune.methods.width.sequential import Way, given, narrow


@dataclass(frozen=True)
class GroupFisher:
    """The score of a unit is the sum over sequences of (dL / dm)^2, m being a factor on what it puts out.

    Liu et al. 2021, "Group Fisher Pruning for Practical Network Compression", eq. 4: the diagonal of the Fisher matrix of
    the gates; also the first step of Kwon et al. 2022, whose mask tuning is `compensate=least-squares`.
    """

    compensate: str = "none"

    kind: ClassVar[str] = "width"
    needs: ClassVar[frozenset[str]] = frozenset({TEXT})
    patterns: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2108.00708"
    takes_list: ClassVar[bool] = False
    memory: ClassVar[str] = "the model, and the activations of one batch in all layers; no gradients of weights"

    def __post_init__(self) -> None:
        Way(None, self.compensate)

    def decide(self, trunk: Trunk, asked: Narrow) -> Narrowed:
        check_gates(trunk.model, asked.units.values())
        return narrow(trunk, asked, Way(given(self.scores(trunk, asked)), self.compensate))

    def scores(self, trunk: Trunk, asked: Narrow) -> dict[tuple[int | None, str], torch.Tensor]:
        """The score of every unit, by place."""
        total = {place: torch.zeros(one.count, dtype=torch.float64) for place, one in asked.units.items()}
        with trunk.loaded(*range(trunk.depth)):
            for batch in trunk.batches:
                size, device = len(batch["input_ids"]), batch["input_ids"].device
                gates = {
                    place: torch.ones(size, one.count, device=device, requires_grad=True)
                    for place, one in asked.units.items()
                }
                with gated(trunk.model, asked.units.values(), gates):
                    backward(trunk, [batch])
                for place, gate in gates.items():
                    assert gate.grad is not None
                    # of each sequence's own loss, not of its share in the batch
                    total[place] += (gate.grad * size).double().square().sum(0).cpu()
        return total
