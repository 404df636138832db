"""Which device and which precision a run uses."""

from __future__ import annotations

from typing import Any

import torch

from llmprune.types import UserError


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the accelerator if there is one. Raises UserError."""
    if name == "auto":
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} is not to be had here: {str(error).splitlines()[0]}") from error
    return device


def choose_dtype(name: str, config: Any, device: torch.device) -> torch.dtype:
    """The dtype of forward passes: on CPU float32, on an accelerator the checkpoint's own, unless named."""
    if name != "auto":
        chosen: torch.dtype = getattr(torch, name)
        return chosen
    stored = getattr(config, "dtype", None)
    if device.type == "cpu" or not isinstance(stored, torch.dtype):
        return torch.float32
    return stored
