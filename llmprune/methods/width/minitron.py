"""Minitron: heads and channels by how active they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llmprune.engine.trunk import Trunk
from llmprune.engine.widths import Evidence, measure
from llmprune.methods.structural import Narrow
from llmprune.methods.width.sequential import ScoredUnits
from llmprune.statistics import MOMENTS


@dataclass(frozen=True)
class Minitron(ScoredUnits):
    """The score of a unit is the root mean square of what it puts out over all calibration tokens of the dense model.

    Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation", section 2.2. The paper
    takes the mean of absolute values over a sequence before the L2 norm over the batch; here every token counts alike.
    `width.units=channel,residual` is the paper's choice: heads stay. On text of one domain this is contextual pruning (Valicenti et al. 2023, "Mini-GPTs").
    """

    kinds: ClassVar[frozenset[str]] = frozenset({MOMENTS})
    scores_hidden: ClassVar[bool] = True
    pruned: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv:2407.14679"
    memory: ClassVar[str] = "one layer, and with compensation the new o and down matrices of all layers"

    def hidden(self, trunk: Trunk, asked: Narrow) -> torch.Tensor:
        """Summed over all norms of the layers, the root mean square of what each hands to the matrices that read it."""
        states = trunk.enter()
        score_D = torch.zeros(asked.roles.hidden)
        for index, layer in enumerate(asked.roles.layers):
            with trunk.loaded(index):
                for one in measure(trunk, index, states, layer.readers, self.kinds).values():
                    score_D += (one.square_sums_I / one.tokens).sqrt().cpu()
                states = trunk.run(index, states)
        return score_D

    def score(self, evidence: Evidence) -> torch.Tensor:
        assert evidence.stats is not None
        return (evidence.per_unit(evidence.stats.square_sums_I) / evidence.stats.tokens).sqrt()
