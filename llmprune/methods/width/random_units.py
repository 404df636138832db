"""Heads and channels by lot: what every method should beat."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch

from llmprune.arch.units import Units
from llmprune.checkpoint.slicing import HIDDEN
from llmprune.engine.trunk import Trunk
from llmprune.engine.widths import Evidence
from llmprune.methods.structural import Narrow
from llmprune.methods.width.sequential import ScoredUnits


@dataclass(frozen=True)
class RandomUnits(ScoredUnits):
    """Units are drawn with `seed`, in every layer anew."""

    seed: int = 0

    scores_hidden: ClassVar[bool] = True
    compares: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()
    paper: ClassVar[str] = ""
    memory: ClassVar[str] = "one layer"

    def score(self, evidence: Evidence) -> torch.Tensor:
        return self._draw(evidence.units, evidence.first, evidence.count)

    def hidden(self, trunk: Trunk, asked: Narrow) -> torch.Tensor:
        units = asked.units[HIDDEN]
        return self._draw(units, 0, units.count)

    def _draw(self, units: Units, first: int, count: int) -> torch.Tensor:
        # another draw for every layer and kind, the same one whenever it is asked for
        place = f"{self.seed} {units.layer} {units.kind} {first}"
        seed = int.from_bytes(hashlib.sha256(place.encode()).digest()[:8], "little") >> 1
        return torch.rand(count, generator=torch.Generator().manual_seed(seed))
