"""Heads and channels by lot: what every method should beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llmprune.engine.trunk import Trunk
from llmprune.engine.widths import Evidence
from llmprune.methods.structural import Narrow, Narrowed
from llmprune.methods.width.sequential import Way, narrow


@dataclass(frozen=True)
class RandomUnits:
    """Units are drawn with `seed`, in every layer anew."""

    seed: int = 0

    kind: ClassVar[str] = "width"
    needs: ClassVar[frozenset[str]] = frozenset()
    patterns: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = ""
    takes_list: ClassVar[bool] = False
    memory: ClassVar[str] = "one layer"

    def decide(self, trunk: Trunk, asked: Narrow) -> Narrowed:
        generator = torch.Generator().manual_seed(self.seed)

        def score(evidence: Evidence) -> torch.Tensor:
            return torch.rand(evidence.count, generator=generator)

        return narrow(trunk, asked, Way(score))
