"""Pruning and tuning that adapt to each other: units go by outlier-aware salience, adapters grow where they matter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import reduce
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from llmprune.arch.units import Units
from llmprune.recovery.masked import MaskedLowRank
from llmprune.recovery.progressive import MEMORY, Mask, Progressive, watched
from llmprune.recovery.zeros import Target
from llmprune.types import UserError

# How often adapters grow.
GROWTHS = 4


class Salient(Mask):
    """Notes, of every input column of the matrix, the sums over tokens from which the salience of its unit comes.

    `moments_4I`: means of w^n over a column of the frozen matrix, n from 1 to 4. `sums_7I`: over tokens, of |dL/dx|, |x|,
    x, x^2, x^3, x^4, and their number.
    """

    def __init__(self, units: Units, target: Target) -> None:
        super().__init__(units, target.kept.device)
        weight = getattr(target.owner, target.short).detach().float()
        sums_4I = torch.stack([self.per_column(weight**n) for n in range(1, 5)])
        self.moments_4I = sums_4I * (sums_4I.shape[1] / weight.numel())
        self.sums_7I = torch.zeros(7, sums_4I.shape[1], device=weight.device)

    def note(self, x: torch.Tensor, gradient: torch.Tensor) -> None:
        x_TI, gradient_TI = (one.detach().float().flatten(0, -2) for one in (x, gradient))
        powers = (x_TI**n for n in range(1, 5))
        parts = (gradient_TI.abs(), x_TI.abs(), *powers, torch.ones_like(x_TI))
        self.sums_7I += torch.stack([one.sum(0) for one in parts])

    def taken(self) -> torch.Tensor:
        """Salience: products of activations and gradients, and roots of kurtosis, each on the scale of their mean."""
        sums_7I = reduce(self.sums_7I, "mean")
        self.sums_7I = torch.zeros_like(sums_7I)
        gradient_I, activation_I, *powers, tokens_I = sums_7I
        tails_I = kurtosis(self.moments_4I * torch.stack(powers) / tokens_I).sqrt()
        parts = (gradient_I * activation_I, tails_I)
        product_U, tails_U = (self.per_unit(one) for one in parts)
        return product_U / product_U.mean().clamp_min(1e-30) + tails_U / tails_U.mean()


def kurtosis(raw_4I: torch.Tensor) -> torch.Tensor:
    """E (o - m)^4 / (E (o - m)^2)^2 from raw moments E o^n, n from 1 to 4; 1, the least there is, where o never varies.

    The moments of all products w x of independent sets are the products of their moments.
    """
    mean_I, second_I, third_I, fourth_I = raw_4I.cpu().double()  # differences of products
    variance_I = second_I - mean_I.square()
    central_I = fourth_I - 4 * mean_I * third_I + 6 * mean_I.square() * second_I - 3 * mean_I**4
    return torch.where(variance_I > 0, central_I / variance_I.square(), 1.0).clamp_min(1.0).to(raw_4I)


class Growing(MaskedLowRank):
    """An adapter with room for more ranks than the `active` ones; those that are not have no part in anything.

    `importance`: moving average of the sum over ranks of |sum of b dL/db|, as in the authors' code.
    """

    active: torch.Tensor
    importance: torch.Tensor

    def __init__(self, target: Target, rank: int, room: int, scale: float, random: torch.Generator) -> None:
        super().__init__(target.kept, room, scale, random)
        self.register_buffer("active", torch.tensor(rank, device=target.kept.device))
        self.register_buffer("importance", torch.zeros((), device=target.kept.device))
        self.slope_R = torch.zeros(room, device=target.kept.device)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        used_R = torch.arange(self.b.shape[-1], device=self.b.device) < self.active
        change = self.scale * (watched(self.b, self._note) * used_R) @ self.a
        return (weight.float() + change.masked_fill(~self.kept, 0)).to(weight.dtype)

    def _note(self, b: torch.Tensor, gradient: torch.Tensor) -> None:
        self.slope_R += (b * gradient).flatten(0, -2).sum(0)

    def weigh(self) -> None:
        """Take into the average what was noted since the last call."""
        found = reduce(self.slope_R, "mean").abs().sum()
        self.slope_R = torch.zeros_like(self.slope_R)
        self.importance.lerp_(found, 1 - MEMORY)


@dataclass
class Apt(Progressive):
    """APT (Zhao et al. 2024, arXiv:2401.12200): adaptive pruning and tuning.

    A unit's salience is the sum over its columns of (sum over tokens of |dL/dx|) (sum of |x|), plus the root of the kurtosis
    of the column's contributions to the outputs (section 4.2), as a moving average; units go by a cubic schedule, and
    their masks fall bit by bit. `growth`: in four steps over the ramp the ranks of the half of the
    adapters with the highest importance (section 4.3) grow, up to `growth` times `rank`; new rows of A are random, new
    columns of B zero, so nothing jumps.

    Otherwise than in the paper every layer gets the same shape, which a plain class has, so units are compared within their
    layer, not by salience per parameter over all of them, and the hidden state keeps its width; both parts of salience are on the
    scale of their mean, since the first depends on the size of a batch; kurtosis is that of the frozen matrix; room for
    all ranks is there from the start; and the teacher, if there is one (`distill`), is the dense model, not a copy of the student.
    """

    growth: float = 2.0

    def check(self, targets: list[Target]) -> None:
        super().check(targets)
        if self.growth < 1:
            raise UserError(f"growth={self.growth} must be at least 1: how many times its rank an adapter may have")

    def adapter(self, target: Target, random: torch.Generator) -> MaskedLowRank:
        return Growing(target, self.rank, math.ceil(self.growth * self.rank), self.alpha / self.rank, random)

    def mask(self, units: Units, target: Target) -> Mask:
        if units.stacked:
            raise UserError(
                f"apt weighs what enters {target.name}, whose experts are one tensor: name other units, as units=kv-group, "
                "or choose splora"
            )
        return Salient(units, target)

    def prepare(self, model: PreTrainedModel, targets: list[Target]) -> nn.Module:
        by_name = {target.name: target for target in targets}
        trained = super().prepare(model, targets)
        self._hooks: list[RemovableHandle] = []
        for place, mask in self.masks.items():
            writer = self.units_of(place).writer
            assert writer is not None

            def watch(module: nn.Module, args: tuple[Any, ...], mask: Any = mask) -> tuple[Any, ...]:
                return (watched(args[0], mask.note), *args[1:])

            self._hooks.append(by_name[writer.name].owner.register_forward_pre_hook(watch))
        return trained

    def after_step(self, done: int, steps: int) -> bool:
        if not self.settled(done - 1, steps):
            self._tune(done, max(1, round(self.ramp * steps)))
        return super().after_step(done, steps)

    @torch.no_grad()
    def _tune(self, done: int, last: int) -> None:
        """Let the adapters that matter most grow, if it is time."""
        growing: list[Growing] = self.adapters  # type: ignore[assignment]
        for one in growing:
            one.weigh()
        if done * GROWTHS // last > (done - 1) * GROWTHS // last:
            order = sorted(growing, key=lambda one: float(one.importance), reverse=True)
            for one in order[: len(order) // 2]:
                grown = math.ceil(int(one.active) * self.growth ** (1 / GROWTHS))
                one.active.fill_(min(grown, one.b.shape[-1]))

    def merge(self, targets: list[Target]) -> None:
        for one in self._hooks:
            one.remove()
        super().merge(targets)
