"""Tensors that a run keeps on disk for a while, in the system's folder for temporary files (TMPDIR)."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from llmprune.types import RunError, UserError


def check_room(what: str, needed: int, advice: str = "") -> None:
    """Whether `needed` bytes fit on the disk of temporary files; raises UserError naming `what` takes them."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{what}, {needed / 2**30:.1f} GiB: {folder} has {free / 2**30:.1f} GiB free; "
            f"set TMPDIR to a larger disk{advice}"
        )


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a file of tensors; raises RunError."""
    try:
        save_file({name: one.contiguous() for name, one in tensors.items()}, path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write {path}: {error}; set TMPDIR to a larger disk") from error
