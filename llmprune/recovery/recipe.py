"""The recipe of a recovery: what to train, on which text, how long."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from llmprune.recipe import Strict, merge_settings, read_recipe, validated
from llmprune.recovery import PRESETS


class Data(Strict):
    """The text to train on. Its last part is held out, to choose the best weights by."""

    source: str = Field(default="demo", description="SPEC of a text, or of conversations and instructions")
    seqlen: int = Field(default=512, ge=2, description="tokens a sequence, cut to the model's maximum")
    held_out: float = Field(default=0.15, gt=0, lt=1, description="share at the end that is never trained on")


class Training(Strict):
    """How the weights move. A step is one change of the weights, on `batch_size` sequences."""

    epochs: float = Field(default=1, gt=0, description="times through the text, where `steps` is not given")
    steps: int | None = Field(default=None, ge=1)
    minutes: float | None = Field(default=None, gt=0, description="the most it may take; the rate falls in time for it")
    learning_rate: float | None = Field(default=None, gt=0, description="at its peak; that of the kind by default")
    warm_up: int = Field(default=20, ge=0, description="steps until the peak, at most a tenth of all")
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    batch_size: int = Field(default=16, ge=1, description="sequences a step, over all processes")
    micro_batch: int = Field(default=8, ge=1, description="sequences a forward pass of one process")
    evaluate_every: int = Field(default=50, ge=1, description="steps between two looks at the held-out text")
    patience: int | None = Field(default=None, ge=1, description="looks without improvement before it stops")
    precision: Literal["float32", "bfloat16"] = Field(default="float32", description="of the products")
    gradient_checkpointing: bool = Field(default=False, description="recompute activations instead of keeping them")
    shard: bool = Field(default=False, description="spread weights and moments over the processes (FSDP2)")


class Distill(Strict):
    """Closeness to the dense parent as (a part of) the loss."""

    teacher: str | None = Field(default=None, description="the dense model; the recipe of the pruned model names it")
    weight: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="of the KL divergence, the rest is cross entropy; 1 where a teacher is named",
    )
    temperature: float = Field(default=1.0, gt=0)
    top_k: int = Field(
        default=64, ge=0, description="most likely tokens that are kept apart; 0: all, teacher in memory"
    )
    hidden: float = Field(default=0.0, ge=0, description="weight of the hidden states' error in it; needs top_k=0")

    def share(self) -> float:
        """The weight of the divergence in the loss."""
        return float(self.teacher is not None) if self.weight is None else self.weight


class Recovery(Strict):
    """What `recover` does to a pruned model."""

    model: str = ""
    how: str = "blockwise"
    options: dict[str, Any] = Field(default_factory=dict, description="the kind's own fields")
    data: Data = Field(default_factory=Data)
    training: Training = Field(default_factory=Training)
    distill: Distill = Field(default_factory=Distill)
    adapter: str | None = Field(default=None, description="folder for the adapter alone, in PEFT's format")
    device: str = "auto"
    seed: int = Field(default=0, ge=0, lt=2**63)
    trust_remote_code: bool = False


def load_recovery(path: Path | None, settings: dict[str, Any]) -> Recovery:
    """The recipe of a YAML file with settings over it, and a preset (`how`) under both; raises UserError."""
    given = merge_settings(read_recipe(path), settings, Recovery)
    preset = copy.deepcopy(PRESETS.get(given.get("how", ""), {}))
    for section, value in preset.items():
        if isinstance(value, dict):
            given[section] = {**value, **(given.get(section) or {})}
    return validated({**given, **({"how": preset["how"]} if preset else {})}, Recovery)
