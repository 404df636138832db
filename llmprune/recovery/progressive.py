"""Adapters are trained while units of width go step by step, those with the lowest scores first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from llmprune.arch.units import Units
from llmprune.checkpoint.slicing import Place
from llmprune.methods.width.choice import lowest
from llmprune.recovery.gradual import rising
from llmprune.recovery.masked import MaskedLowRank
from llmprune.recovery.narrower import Narrower, OnColumns
from llmprune.recovery.zeros import Target, attach, chosen

# Of the ramp: the share in which units are chosen; in the rest the factors of the last ones fall to zero.
CHOOSING = 0.8
# What a moving average of scores keeps at a step, unless its paper says otherwise.
MEMORY = 0.85

Note = Callable[[torch.Tensor, torch.Tensor], None]


class _Watched(torch.autograd.Function):
    """A value as it is; in the backward pass `note` hears of it and of its gradient."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, note: Note) -> torch.Tensor:
        ctx.save_for_backward(value)
        ctx.note = note
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.note(ctx.saved_tensors[0], gradients[0])
        return gradients[0], None


def watched(value: torch.Tensor, note: Note) -> torch.Tensor:
    """`value`, whose gradient `note(value, gradient)` will be told; once for each backward pass through it."""
    found: torch.Tensor = _Watched.apply(value, note)  # type: ignore[no-untyped-call]
    return found


class Mask(OnColumns):
    """The factor of every unit: 1 for those that are `kept`, and for others on its way from 1 to 0.

    `score`: the moving average by which units are chosen. All three are stored with the training's state.
    """

    factor: torch.Tensor
    kept: torch.Tensor
    score: torch.Tensor

    def __init__(self, units: Units, device: torch.device) -> None:
        super().__init__(units, device)
        self.register_buffer("factor", torch.ones(units.count, device=device))
        self.register_buffer("kept", torch.ones(units.count, dtype=torch.bool, device=device))
        self.register_buffer("score", torch.zeros(units.count, device=device))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return self.times(weight, self.factor)

    def choose(self, gone: int) -> None:
        """From now on the `gone` units with the lowest scores are on their way out, as many in each stratum."""
        self.kept.fill_(True)
        self.kept[lowest(self.score, gone, self.strata)] = False

    def move(self, by: float) -> None:
        """Bring every factor closer to where it goes; `by` 1 or more: all the way."""
        self.factor.add_(torch.where(self.kept, by, -by)).clamp_(0, 1)

    def taken(self) -> torch.Tensor:
        """The scores of the units by what was noted since the last call, in all processes: U, alike in each."""
        raise NotImplementedError

    def gone(self) -> list[int]:
        return (~self.kept).nonzero().flatten().tolist()


@dataclass
class Progressive(Narrower):
    """Low-rank adapters beside frozen weights, and a mask on the units of each layer.

    The number of units that are gone rises by the cubic law of Zhu & Gupta 2017 (arXiv:1710.01878) over the first part
    of the `ramp`; which ones they are is chosen anew at every step. What is masked gets no gradient, so rows and columns
    of the adapters go with those of the base. `rank`, `alpha`: of the adapters, which all matrices of the layers have, so
    that a gradient tells about every unit; merged at the end. `memory`: what a moving average of scores keeps at a step.
    """

    learning_rate: ClassVar[float] = 1e-3
    trains_base: ClassVar[bool] = False
    memory: ClassVar[float] = MEMORY

    rank: int = 8
    alpha: float = 16.0
    seed: int = 0

    def adapter(self, target: Target, random: torch.Generator) -> MaskedLowRank:
        """The adapter of a matrix."""
        return MaskedLowRank(target.kept, self.rank, self.alpha / self.rank, random)

    def mask(self, units: Units, target: Target) -> Mask:
        """The mask of the units that write through a matrix."""
        raise NotImplementedError

    def prepare(self, model: PreTrainedModel, targets: list[Target]) -> nn.Module:
        places = self.planned(model, targets)
        model.requires_grad_(False)
        random = torch.Generator().manual_seed(self.seed)
        self.adapters = attach(chosen(targets, "all-linear"), lambda one: self.adapter(one, random))
        self.masks = {place: self.mask(self.units_of(place), target) for place, target in places.items()}
        by_name = {target.name: self.masks[place] for place, target in places.items()}
        attach(list(places.values()), lambda target: by_name[target.name])
        trained: nn.Module = model
        return trained

    @torch.no_grad()
    def after_step(self, done: int, steps: int) -> bool:
        if self.settled(done - 1, steps):
            return False
        choosing = CHOOSING * self.ramp * steps
        for place, mask in self.masks.items():
            mask.score.lerp_(mask.taken(), 1 - self.memory)
            if done - 1 < choosing:
                mask.choose(self.due(place, rising(0.0, 1.0, done / choosing)))
            last = self.settled(done, steps)
            mask.move(1.0 if last else 1 / ((1 - CHOOSING) * self.ramp * steps))
        return False

    def removed(self) -> dict[Place, list[int]]:
        return {place: mask.gone() for place, mask in self.masks.items()}
