"""What is made small: cross entropy with the text, and distance from the dense parent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional as F

from llmprune.recovery.data import IGNORED, Sequences
from llmprune.recovery.recipe import Distill


class Loss(Protocol):
    """The sum over the scored tokens of a batch, whose rows are `numbers` of the training sequences."""

    def __call__(self, forward: Callable[..., Any], batch: Sequences, numbers: list[int]) -> torch.Tensor: ...


class Teacher(Protocol):
    """What the dense parent says about training sequences."""

    def compare(self, output: Any, batch: Sequences, numbers: list[int]) -> torch.Tensor:
        """Summed distance of a student's output from the parent's, over the scored tokens."""


def cross_entropy(forward: Callable[..., Any], batch: Sequences, numbers: list[int]) -> torch.Tensor:
    """Negative log likelihood, summed over the scored tokens."""
    return _likelihood(forward(input_ids=batch.ids_NT, use_cache=False).logits, batch)


def _likelihood(logits_NTV: torch.Tensor, batch: Sequences) -> torch.Tensor:
    scores = logits_NTV[:, :-1].float().transpose(1, 2)
    return F.cross_entropy(scores, batch.labels_NT[:, 1:], ignore_index=IGNORED, reduction="sum")


@dataclass
class Distillation:
    """(1 - weight) of the cross entropy, and `weight` of the distance from the parent."""

    teacher: Teacher
    settings: Distill

    def __call__(self, forward: Callable[..., Any], batch: Sequences, numbers: list[int]) -> torch.Tensor:
        output = forward(input_ids=batch.ids_NT, use_cache=False, output_hidden_states=self.settings.hidden > 0)
        weight = self.settings.share()
        loss = weight * self.teacher.compare(output, batch, numbers)
        return loss + (1 - weight) * _likelihood(output.logits, batch) if weight < 1 else loss


def divergence(teacher_TK: torch.Tensor, student_TK: torch.Tensor, *, rest: bool) -> torch.Tensor:
    """Forward Kullback-Leibler divergence of each token, from log probabilities of the same K outcomes.

    `rest`: all other outcomes count as one more, so that the divergence is a true one (never negative, zero only where
    the K probabilities agree) and rises to that over the whole vocabulary with K.
    """
    if rest:
        teacher_TK = torch.cat([teacher_TK, _log_rest(teacher_TK)], -1)
        student_TK = torch.cat([student_TK, _log_rest(student_TK)], -1)
    return (teacher_TK.exp() * (teacher_TK - student_TK)).sum(-1)


def _log_rest(log_TK: torch.Tensor) -> torch.Tensor:
    """log(1 - sum of the probabilities), T x 1; bounded where rounding leaves nothing."""
    floor = torch.finfo(log_TK.dtype).eps
    return torch.log1p(-log_TK.exp().sum(-1, keepdim=True).clamp(max=1 - floor))
