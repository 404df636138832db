"""Matrices solved at several amounts, on disk: a file a layer and amount."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import safe_open

from llmprune.temporary import save
from llmprune.types import UserError


class LevelStore:
    """The matrices of a layer at an amount, by name, as their parameters hold them.

    The level database of Frantar and Alistarh 2022 (arXiv:2208.11580, section 6): solve once, then put together any choice.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has(self, amount: str, layer: int) -> bool:
        return self._file(amount, layer).is_file()

    def save(self, amount: str, layer: int, matrices: dict[str, torch.Tensor]) -> None:
        """Write a file whole, or not at all."""
        path = self._file(amount, layer)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".writing")
        save(matrices, temporary)
        temporary.rename(path)

    def load(self, amount: str, layer: int, names: Collection[str] | None = None) -> dict[str, torch.Tensor]:
        """All that there are, or those of some names that there are."""
        with safe_open(self._file(amount, layer), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if names is None or name in names}  # noqa: SIM118

    def make_room(self, amounts: int, size: int) -> None:
        """Whether `amounts` times `size` bytes fit on the disk; raises UserError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        needed, free = amounts * size, shutil.disk_usage(self._folder).free
        if needed > free:
            raise UserError(
                f"{amounts} amounts of every layer take {needed / 2**30:.1f} GiB, {self._folder} has {free / 2**30:.1f} "
                "free; give fewer amounts, or a larger disk"
            )

    def _file(self, amount: str, layer: int) -> Path:
        return self._folder / amount.replace(":", "-") / f"{layer}.safetensors"
