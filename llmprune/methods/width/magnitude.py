"""Heads and channels by the size of their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llmprune.engine.trunk import Trunk
from llmprune.engine.widths import Evidence
from llmprune.methods.structural import Narrow, Narrowed
from llmprune.methods.width.sequential import Way, narrow


@dataclass(frozen=True)
class GroupMagnitude:
    """The units whose weights have the least norm go: all their rows and columns, in every matrix, count together.

    Li et al. 2017, "Pruning Filters for Efficient ConvNets", section 3.1, for whole dependency groups (Fang et al. 2023,
    DepGraph, eq. 6). `norm`: 1 or 2.
    """

    norm: int = 2

    kind: ClassVar[str] = "width"
    needs: ClassVar[frozenset[str]] = frozenset()
    patterns: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:1608.08710"
    takes_list: ClassVar[bool] = False
    memory: ClassVar[str] = "one layer"

    def __post_init__(self) -> None:
        if self.norm not in (1, 2):
            raise ValueError(f"norm {self.norm} is neither 1 nor 2")

    def decide(self, trunk: Trunk, asked: Narrow) -> Narrowed:
        return narrow(trunk, asked, Way(self.score))

    def score(self, evidence: Evidence) -> torch.Tensor:
        return torch.stack([rows.abs().pow(self.norm).sum((1, 2)) for rows in evidence.weights()]).sum(0)
