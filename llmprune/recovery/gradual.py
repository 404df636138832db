"""Pruning while training: the share of zeros rises step by step, smallest weights first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from llmprune import masks
from llmprune.recovery.kind import Kind
from llmprune.recovery.zeros import Keep, Target, attach
from llmprune.types import Budget, MatrixSpec, Pattern, UserError


def rising(start: float, end: float, progress: float) -> float:
    """The cubic rise of Zhu & Gupta 2017, arXiv:1710.01878, equation 1; `progress` from 0 to 1."""
    return end + (start - end) * (1 - min(max(progress, 0.0), 1.0)) ** 3


def pruned_by(scores: torch.Tensor, specs: tuple[MatrixSpec, ...], budget: Budget) -> torch.Tensor:
    """What the lowest scores of each matrix in a parameter say is to go: bool, in the layout of the parameter."""
    found = torch.zeros_like(scores, dtype=torch.bool)
    for spec in specs:
        own, out = (scores, found) if spec.index is None else (scores[spec.index], found[spec.index])
        chosen_OI = masks.select(own.T.contiguous() if spec.transposed else own, budget, by="matrix")
        out.copy_(chosen_OI.T if spec.transposed else chosen_OI)
    return found


@dataclass
class Amount(Kind):
    """Kinds that prune as they train: how much in the end, and when the last weight is chosen."""

    keeps_zeros: ClassVar[bool] = False
    shards: ClassVar[bool] = False  # masks are chosen on whole matrices

    sparsity: float = 0.0
    pattern: str = "unstructured"
    end: float = 0.6

    def budget(self, sparsity: float | None = None) -> Budget:
        """The amount in the end, or another share of zeros on the way there."""
        if (pattern := Pattern.parse(self.pattern)).structured:
            return Budget.of(None, pattern)
        return Budget.of(self.sparsity if sparsity is None else sparsity, pattern)

    def check(self, targets: list[Target]) -> None:
        budget = self.budget()
        if not budget.sparsity > 0:
            raise UserError("say how much to prune: --set sparsity=0.5, or --set pattern=2:4")
        if not 0 < self.end <= 1:
            raise UserError(f"end={self.end} must lie in (0, 1]: the share of the steps after which no more is pruned")
        for spec in (spec for one in layered(targets) for spec in one.specs):
            if spec.transposed is None:
                raise UserError(
                    f"{spec.name}: which axis holds the inputs is not known; it cannot be pruned in training"
                )
            if budget.pattern.structured and spec.inputs % budget.pattern.group:
                raise UserError(f"{spec.name} has {spec.inputs} inputs, which {budget.pattern} does not divide")

    def settled(self, done: int, steps: int) -> bool:
        return done >= self.end * steps


def layered(targets: list[Target]) -> list[Target]:
    """The matrices of the decoder layers; the head is never pruned in training."""
    return [one for one in targets if one.place is not None]


class Shrinking(Keep):
    """A mask that is chosen anew now and then; stored with the training's state."""

    def __init__(self, kept: torch.Tensor) -> None:
        super().__init__(kept)
        self.register_buffer("kept", kept.clone(), persistent=True)


@dataclass
class Gradual(Amount):
    """Magnitude pruning during training (Zhu & Gupta 2017, arXiv:1710.01878), all weights trained.

    `sparsity` or `pattern`: the zeros of each matrix in the end; `every` so many steps the smallest weights go, until
    the share `end` of the steps is done. With `rewind` the weights left go back to where they started each time, as in
    lottery tickets (Frankle & Carbin 2019, arXiv:1803.03635).
    """

    learning_rate: ClassVar[float] = 3e-4

    every: int = 10
    rewind: bool = False

    def prepare(self, model: PreTrainedModel, targets: list[Target]) -> nn.Module:
        model.requires_grad_(True)
        self._targets = layered(targets)
        self._masks = attach(self._targets, lambda one: Shrinking(one.kept))
        self._starts = [float((~one.kept).sum()) / one.kept.numel() for one in self._targets]
        # views of the same storage would move along
        self._before = [one.detach().clone() for one in self._originals()] if self.rewind else []
        trained: nn.Module = model
        return trained

    def after_step(self, done: int, steps: int) -> bool:
        last = max(1, round(self.end * steps))
        if done > last or (done % self.every and done != last):
            return False
        for target, module, weight, start in zip(
            self._targets, self._masks, self._originals(), self._starts, strict=True
        ):
            share = rising(start, self.budget().sparsity, done / last)
            scores = weight.detach().abs().masked_fill(~module.kept, -1)
            module.kept.copy_(~pruned_by(scores, target.specs, self.budget(share)))
        for weight, before in zip(self._originals(), self._before, strict=False):
            weight.data.copy_(before)
        return self.rewind

    def _originals(self) -> Iterator[torch.Tensor]:
        for target in self._targets:
            yield target.owner.parametrizations[target.short].original  # type: ignore[union-attr, index]
