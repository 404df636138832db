"""All weights are trained, the zeros of pruned matrices stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from transformers import PreTrainedModel

from llmprune.recovery.kind import Kind
from llmprune.recovery.zeros import Keep, Target, attach, detach
from llmprune.types import UserError

PARTS = ("all", "matrices")


@dataclass
class Finetune(Kind):
    """Masked full fine-tuning: gradients of zeros are zero, so Adam leaves them where they are.

    `train`: "all" parameters, or only the "matrices" of the decoder layers.
    """

    learning_rate: ClassVar[float] = 3e-4

    train: str = "all"

    def __post_init__(self) -> None:
        if self.train not in PARTS:
            raise UserError(f"train={self.train!r} of kind 'finetune' must be one of {', '.join(PARTS)}")

    def prepare(self, model: PreTrainedModel, targets: list[Target]) -> nn.Module:
        model.requires_grad_(self.train == "all")
        for target in targets:
            model.get_parameter(target.name).requires_grad_(True)
        self._targets = [target for target in targets if not target.kept.all()]
        for _ in attach(self._targets, lambda target: Keep(target.kept)):
            pass
        return model

    def merge(self, model: nn.Module) -> None:
        detach(self._targets)
