"""Heads and channels by lot: what every method should beat."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch

from llmprune.engine.widths import Evidence
from llmprune.methods.width.sequential import ScoredUnits


@dataclass(frozen=True)
class RandomUnits(ScoredUnits):
    """Units are drawn with `seed`, in every layer anew."""

    seed: int = 0

    needs: ClassVar[frozenset[str]] = frozenset()
    paper: ClassVar[str] = ""
    memory: ClassVar[str] = "one layer"

    def score(self, evidence: Evidence) -> torch.Tensor:
        # another draw for every layer and kind, the same one whenever it is asked for
        place = f"{self.seed} {evidence.units.layer} {evidence.units.kind} {evidence.first}"
        seed = int.from_bytes(hashlib.sha256(place.encode()).digest()[:8], "little") >> 1
        return torch.rand(evidence.count, generator=torch.Generator().manual_seed(seed))
