"""Runs of both schedules on tiny models."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

import llmprune

SCHEDULES = ["layer", "module"]


def assert_no_hooks(model: PreTrainedModel) -> None:
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def prune(model: PreTrainedModel, how: str, **settings: Any) -> llmprune.Result:
    """Tokens 0 to 11 and 20 to 31 are batch 0, 40 to 51 and 60 to 71 batch 1, 80 to 91 batch 2."""
    ids = [torch.arange(12) + first for first in (0, 20, 40, 60, 80)]
    settings = {"method": "sparsegpt", "sparsity": 0.5, **settings}
    return llmprune.prune(model, calibration=ids, batch_size=2, schedule=how, **settings)
