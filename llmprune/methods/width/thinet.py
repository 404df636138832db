"""ThiNet: the units whose joint contribution to the next matrix's output is smallest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llmprune.engine.trunk import Trunk
from llmprune.engine.widths import Evidence
from llmprune.methods.structural import TEXT, Narrow, Narrowed
from llmprune.methods.width.sequential import Way, narrow
from llmprune.solvers.groups import joint_energy
from llmprune.statistics import GRAM


@dataclass(frozen=True)
class ThiNet:
    """Greedily, the unit with which the set T that goes puts out the least: |sum over T of x_u W_u'|^2.

    Luo et al. 2017, "ThiNet: A Filter Level Pruning Method for Deep Neural Network Compression", eq. 6 and algorithm 1;
    then least squares on the inputs that stay (the paper scales each of them).

    `compensate`: least-squares, bias or none.
    """

    compensate: str = "least-squares"
    damping: float = 0.01

    kind: ClassVar[str] = "width"
    needs: ClassVar[frozenset[str]] = frozenset({TEXT})
    patterns: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:1707.06342"
    takes_list: ClassVar[bool] = False
    memory: ClassVar[str] = (
        "one layer, two square matrices of its inner width in float64, and the new o and down matrices of all layers"
    )

    def __post_init__(self) -> None:
        self._way()

    def decide(self, trunk: Trunk, asked: Narrow) -> Narrowed:
        return narrow(trunk, asked, self._way())

    def _way(self) -> Way:
        return Way(self.score, self.compensate, damping=self.damping, kinds=frozenset({GRAM}))

    def score(self, evidence: Evidence) -> torch.Tensor:
        """The place of every unit in the greedy order."""
        assert evidence.stats is not None
        energy_UU = joint_energy(evidence.writer_OI, evidence.stats.gram_II, evidence.columns_UN)
        place_U = energy_UU.new_empty(evidence.count)
        cost_U = energy_UU.diagonal().clone()
        for step in range(evidence.count):
            unit = int(cost_U.argmin())
            place_U[unit] = step
            cost_U += 2 * energy_UU[unit]
            cost_U[unit] = torch.inf
        return place_U
