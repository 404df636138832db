"""Heads and channels by the size of their weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from llmprune.checkpoint.slicing import HIDDEN
from llmprune.engine.trunk import Trunk
from llmprune.engine.widths import Evidence, slices
from llmprune.methods.structural import Narrow
from llmprune.methods.width.sequential import ScoredUnits


@dataclass(frozen=True)
class GroupMagnitude(ScoredUnits):
    """The units whose weights have the least norm go: all their rows and columns, in every matrix, count together.

    Li et al. 2017, "Pruning Filters for Efficient ConvNets", section 3.1, for whole dependency groups (Fang et al. 2023,
    DepGraph, eq. 6). `norm`: 1 or 2.
    """

    norm: int = 2

    scores_hidden: ClassVar[bool] = True
    compares: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()
    paper: ClassVar[str] = "arXiv:1608.08710"
    memory: ClassVar[str] = "one layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm not in (1, 2):
            raise ValueError(f"norm {self.norm} is neither 1 nor 2")

    def score(self, evidence: Evidence) -> torch.Tensor:
        return self._sum(evidence.weights())

    def hidden(self, trunk: Trunk, asked: Narrow) -> torch.Tensor:
        units = asked.units[HIDDEN]
        prefixes = tuple(unit.prefix for unit in trunk.units)
        outside = trunk.outside(one.parameter for one in units.members if not one.parameter.startswith(prefixes))
        score_D = self._sum(slices(units, {name: one.detach() for name, one in outside.items()})).cpu()
        for index, unit in enumerate(trunk.units):
            with trunk.loaded(index):
                values = {unit.prefix + name: one.detach() for name, one in unit.module.named_parameters()}
                score_D += self._sum(slices(units, values)).cpu()
        return score_D

    def _sum(self, parts: Iterable[torch.Tensor]) -> torch.Tensor:
        """Of the slices of each unit in every parameter, units x slices x entries."""
        return torch.stack([rows_UNK.abs().pow(self.norm).sum((1, 2)) for rows_UNK in parts]).sum(0)
