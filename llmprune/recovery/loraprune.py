"""Units of width go while adapters train, by what the adapters' gradients say of the frozen weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from accelerate.utils import reduce
from torch import nn
from transformers import PreTrainedModel

from llmprune.arch.units import Units
from llmprune.engine.widths import evidences
from llmprune.recovery.masked import MaskedLowRank
from llmprune.recovery.progressive import Mask, Progressive
from llmprune.recovery.zeros import Target, chosen

# Stands in for a norm of zero, as of the first matrix while nothing is noted.
TINY = 1e-30


def estimated_gradient(
    a_RI: torch.Tensor, b_OR: torch.Tensor, slope_a_RI: torch.Tensor, slope_b_OR: torch.Tensor
) -> torch.Tensor:
    """What the loss's slopes along the factors of B A say of its slope along the sum W + B A, O x I.

    Zhang et al. 2023, arXiv:2305.18403, the LoRA-guided criterion: how B A changes in one step of gradient descent of rate 1,
    B A - (B - dB) (A - dA) = dB A + B dA - dB dA.
    """
    return slope_b_OR @ a_RI + b_OR @ slope_a_RI - slope_b_OR @ slope_a_RI


class Guided(MaskedLowRank):
    """An adapter that notes what the gradients of its factors were, and where the factors stood then."""

    def __init__(self, kept: torch.Tensor, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__(kept, rank, scale, generator)
        self._at = [self.a.detach(), self.b.detach()]
        self._slopes = [torch.zeros_like(one) for one in self._at]
        for place, factor in enumerate((self.a, self.b)):
            factor.register_hook(partial(self._note, place, factor))

    def importance(self, weight: torch.Tensor) -> torch.Tensor:
        """|estimated gradient * (W + scale B A)| by what was noted since the last call, over all processes."""
        slopes = [reduce(one, "mean") for one in self._slopes]
        self._slopes = [torch.zeros_like(one) for one in slopes]
        a, b = self._at
        merged = weight.float() + (self.scale * (b @ a)).masked_fill(~self.kept, 0)
        return (estimated_gradient(a, b, *slopes) * merged).abs()

    def _note(self, place: int, factor: torch.Tensor, gradient: torch.Tensor) -> None:
        self._at[place] = factor.detach().clone()
        self._slopes[place] = self._slopes[place] + gradient


class Estimated(Mask):
    """Scores units by the adapters of the matrices that they have slices in."""

    def __init__(self, units: Units, adapted: Mapping[str, tuple[torch.Tensor, Guided]], device: torch.device) -> None:
        super().__init__(units, device)
        self._units = replace(units, members=tuple(one for one in units.members if one.parameter in adapted))
        self._adapted = {one.parameter: adapted[one.parameter] for one in self._units.members}

    def taken(self) -> torch.Tensor:
        importance = {name: adapter.importance(weight) for name, (weight, adapter) in self._adapted.items()}
        found = []
        for evidence in evidences(self._units, {}, importance):
            sums = [rows.sum((1, 2)) for rows in evidence.weights()]
            found.append(torch.stack([one / one.norm().clamp_min(TINY) for one in sums]).sum(0))
        return torch.cat(found)


@dataclass
class LoraPrune(Progressive):
    """LoRAPrune (Zhang et al. 2023, arXiv:2305.18403): units by the gradients of the adapters alone.

    The importance of a weight is |g (w + scale b a)|, its gradient g estimated from the factors and theirs, and that of a
    unit the sum over its slices; no gradient of a frozen weight is computed. The moving average keeps 0.9 of itself at a
    step. As in the authors' code the absolute value stands where the paper has the square, and the sums of each matrix are
    divided by their norm over the units. Otherwise than there, heads of a kv group go together, every layer loses as many,
    the first and the last among them, and masks fall bit by bit.
    """

    memory: ClassVar[float] = 0.9

    ramp: float = 0.2

    def adapter(self, target: Target, random: torch.Generator) -> MaskedLowRank:
        return Guided(target.kept, self.rank, self.alpha / self.rank, random)

    def prepare(self, model: PreTrainedModel, targets: list[Target]) -> nn.Module:
        self._weights = {one.name: getattr(one.owner, one.short) for one in chosen(targets, "all-linear")}
        return super().prepare(model, targets)

    def mask(self, units: Units, target: Target) -> Mask:
        adapted = {
            name: (weight, one) for (name, weight), one in zip(self._weights.items(), self.adapters, strict=True)
        }
        return Estimated(units, adapted, target.kept.device)  # type: ignore[arg-type]
