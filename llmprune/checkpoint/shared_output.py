"""One output of several processes: the first one writes, the others know what it has written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmprune.checkpoint.output import Output
from llmprune.ranks import Ranks
from llmprune.types import RunError


class SharedOutput(Output):
    """An `Output` that all `ranks` call alike. It must lie where all of them can read it, for resuming."""

    def __init__(self, folder: Path, fingerprint: str, ranks: Ranks) -> None:
        super().__init__(folder, fingerprint)
        self._ranks = ranks

    def check(self, *, source: Path | None, resume: bool, overwrite: bool) -> None:
        if self._ranks.leads:
            super().check(source=source, resume=resume, overwrite=overwrite)

    def claim(self, *, resume: bool) -> bool:
        if len(set(self._ranks.gather(self.fingerprint))) > 1:
            raise RunError("the processes of this run see different models, texts or versions; give all the same")
        return bool(self._ranks.tell(super().claim(resume=resume) if self._ranks.leads else None))

    def open(self) -> None:
        if self._ranks.leads:
            super().open()
        self.records = self._ranks.tell(self.records)

    def write(
        self, unit: str, place: tuple[int, int], tensors: dict[str, torch.Tensor], record: dict[str, Any]
    ) -> None:
        if self._ranks.leads:
            super().write(unit, place, tensors, record)
        else:
            self.records[unit] = self._line(unit, place, tensors, record)

    def finish(self, add_files: Callable[[Path], None], describe: Callable[[Path], dict[str, Any]]) -> None:
        if self._ranks.leads:
            super().finish(add_files, describe)
        self._ranks.gather(None)  # until it is there
