"""Movement pruning: scores are trained beside the weights, and a weight that moves towards zero goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from llmprune.recovery.gradual import Amount, layered, pruned_by, rising
from llmprune.recovery.zeros import Target, attach
from llmprune.types import Budget, MatrixSpec, UserError

MODES = ("top-v", "soft")


class _Through(torch.autograd.Function):
    """A mask whose gradient goes to the scores as if it were the scores themselves."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        return kept.to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


class Scored(nn.Module):
    """W * mask(scores): the highest scores of each matrix ("top-v"), or those above a threshold ("soft")."""

    share: torch.Tensor

    def __init__(self, target: Target, threshold: float | None, budget: Callable[[float], Budget]) -> None:
        super().__init__()
        self._budget = budget
        self._specs: tuple[MatrixSpec, ...] = target.specs
        self.register_buffer("alive", target.kept.clone(), persistent=False)
        # above the threshold at first, so that nothing goes before it has moved
        start = torch.zeros(target.kept.shape, device=target.kept.device)
        self.scores = nn.Parameter(start if threshold is None else start + 1)
        self.threshold = threshold
        # of zeros that is due by now: stored with the training's state
        self.register_buffer("share", torch.zeros((), dtype=torch.float64))

    def kept(self) -> torch.Tensor:
        """The mask of the moment; zeros of the start stay."""
        scores = self.scores.detach().masked_fill(~self.alive, -torch.inf)  # type: ignore[operator]
        if self.threshold is not None:
            return scores > self.threshold
        return ~pruned_by(scores, self._specs, self._budget(float(self.share)))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        mask: torch.Tensor = _Through.apply(self.scores, self.kept())  # type: ignore[no-untyped-call]
        return weight * mask


@dataclass
class Movement(Amount):
    """Movement pruning (Sanh et al. 2020, arXiv:2005.07683), all weights trained.

    `mode` "top-v": the share of zeros rises to `sparsity` (or N:M `pattern`) of each matrix. "soft": what falls below
    `threshold` goes, and `pull` times the mean sigmoid of the scores is part of the loss; the share of zeros is what
    comes of it, and masks move until the last step. `score_rate`: of the scores, as a multiple of the weights'.
    """

    learning_rate: ClassVar[float] = 3e-4

    mode: str = "top-v"
    score_rate: float = 100.0
    threshold: float = 0.0
    pull: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"mode={self.mode!r} of kind 'movement' must be one of {', '.join(MODES)}")

    def check(self, targets: list[Target]) -> None:
        if self.mode == "top-v":
            super().check(targets)
        elif self.sparsity or self.pattern != "unstructured":
            raise UserError("mode=soft takes no amount: threshold and pull decide; or leave mode=soft out")

    def prepare(self, model: PreTrainedModel, targets: list[Target]) -> nn.Module:
        model.requires_grad_(True)
        self._targets = layered(targets)
        threshold = self.threshold if self.mode == "soft" else None
        self._scored: list[Any] = [
            one for _, one in attach(self._targets, lambda one: Scored(one, threshold, self.budget))
        ]
        self._starts = [float((~one.kept).sum()) / one.kept.numel() for one in self._targets]
        self._allow(0.0)
        return model

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        scores = [one.scores for one in self._scored]
        known = {id(one) for one in scores}
        weights = [one for one in model.parameters() if one.requires_grad and id(one) not in known]
        return [
            {"params": weights, "scale": 1.0},
            {"params": scores, "scale": self.score_rate, "weight_decay": 0.0},
        ]

    def penalty(self) -> torch.Tensor | float:
        if self.mode == "top-v":
            return 0.0
        total = sum(one.scores.numel() for one in self._scored)
        found: torch.Tensor = (
            self.pull * torch.stack([one.scores.sigmoid().sum() for one in self._scored]).sum() / total
        )
        return found

    def after_step(self, done: int, steps: int) -> bool:
        self._allow(done / max(1, round(self.end * steps)))
        return False

    def settled(self, done: int, steps: int) -> bool:
        return done >= steps if self.mode == "soft" else super().settled(done, steps)

    def _allow(self, progress: float) -> None:
        """Let as large a share of each matrix go as is due."""
        if self.mode == "top-v":
            for one, start in zip(self._scored, self._starts, strict=True):
                one.share.fill_(rising(start, self.budget().sparsity, progress))
