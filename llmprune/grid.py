"""Uniform grids of integer levels, one for each output row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Grid:
    """The values `scale * (level - zero)` for levels 0 ... 2^bits - 1; the value 0 is always among them."""

    bits: int
    scale_O: torch.Tensor
    zero_O: torch.Tensor

    @classmethod
    def of(cls, weight_OI: torch.Tensor, bits: int) -> Grid:
        """The grid that spans each row's smallest to largest weight, as in GPTQ (Frantar et al. 2022)."""
        low_O, high_O = weight_OI.amin(1).clamp_max(0), weight_OI.amax(1).clamp_min(0)
        scale_O = (high_O - low_O) / (2**bits - 1)
        scale_O = torch.where(scale_O > 0, scale_O, 1.0)
        return cls(bits, scale_O, torch.round(-low_O / scale_O))

    def nearest(self, weight_O: torch.Tensor) -> torch.Tensor:
        """The nearest grid value of one weight of every row, or of several: ... x O."""
        level_O = torch.round(weight_O / self.scale_O) + self.zero_O
        return (level_O.clamp_(0, 2**self.bits - 1) - self.zero_O) * self.scale_O

    def notes(self) -> dict[str, Any]:
        """What the report holds: enough to write the weights as integers."""
        return {"bits": self.bits, "scale": self.scale_O.tolist(), "zero": [int(one) for one in self.zero_O.tolist()]}
