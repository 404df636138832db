"""What every kind of recovery is: a dataclass whose fields are its recipe options, with these hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from llmprune.checkpoint.slicing import Slicing
from llmprune.recovery.zeros import Target, detach
from llmprune.width_plan import WidthPlan


class Kind:
    """How a model's weights are made trainable, and made plain again.

    `learning_rate`: its usual one. `trains_base`: whether the stored weights themselves move, which must then be held
    in float32. `keeps_zeros`: whether the zeros found at the start are those of the end. `shards`: whether the weights may
    be spread over processes while it trains them.
    """

    learning_rate: ClassVar[float]
    trains_base: ClassVar[bool] = True
    keeps_zeros: ClassVar[bool] = True
    shards: ClassVar[bool] = True

    def check(self, targets: list[Target]) -> None:
        """Whether a model with these matrices can be recovered so; raises UserError."""

    def prepare(self, model: PreTrainedModel, targets: list[Target]) -> nn.Module:
        """Make `model` trainable: the parameters that require a gradient are trained."""
        raise NotImplementedError

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The parameters to train as groups of an optimizer; `scale` multiplies the rate of a group, `rate` is one of its own."""
        return [{"params": [one for one in model.parameters() if one.requires_grad], "scale": 1.0}]

    def penalty(self) -> torch.Tensor | float:
        """What the kind adds to the mean loss of a step."""
        return 0.0

    def after_step(self, done: int, steps: int) -> bool:
        """Called when `done` of `steps` steps are; whether weights were set anew, so that moments are void."""
        return False

    def settled(self, done: int, steps: int) -> bool:
        """Whether the model has its final zeros, so that it may be kept as the best."""
        return True

    def without_adapter(self, targets: list[Target]) -> str | None:
        """Why what is trained cannot be stored as an adapter in PEFT's format; None if it can."""
        return f"{type(self).__name__} has no adapter in PEFT's format; lora and merge-then-mask have"

    def save_adapter(self, folder: Path) -> None:
        """Write what was trained in PEFT's format."""
        raise NotImplementedError

    def cut(self) -> tuple[WidthPlan, Slicing] | None:
        """After `merge`: what of the model's width is to go; None if it keeps its shape."""
        return None

    def merge(self, targets: list[Target]) -> None:
        """Make the model a plain one again, with its new weights in place."""
        detach(targets)
