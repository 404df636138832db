"""Low-rank adapters of the PEFT library, merged into the weights at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from llmprune.arch.sublayers import attends
from llmprune.recovery.kind import Kind
from llmprune.recovery.zeros import Target, chosen
from llmprune.types import UserError


@dataclass
class Lora(Kind):
    """LoRA (Hu et al. 2021, arXiv:2106.09685): W + alpha / rank * B A beside frozen W.

    For models whose matrices are dense, as after depth, width or expert pruning: the merged adapter has no zeros.
    `targets`: "all-linear", "attention" or "mlp".
    """

    learning_rate: ClassVar[float] = 3e-4
    trains_base: ClassVar[bool] = False

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str = "all-linear"

    def check(self, targets: list[Target]) -> None:
        pruned = [one.name for one in chosen(targets, self.targets) if one.pruned]
        if pruned:
            raise UserError(
                f"a merged LoRA would fill the zeros of {len(pruned)} pruned matrices ({pruned[0]}, …); choose masked "
                "or spp, which keep them, or merge-then-mask"
            )
        self._check_fused(targets)

    def prepare(self, model: PreTrainedModel, targets: list[Target]) -> nn.Module:
        wanted = chosen(targets, self.targets)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # its arithmetic takes any number
            lora_dropout=self.dropout,
            target_modules=[one.name.rpartition(".")[0] for one in wanted if one.specs[0].index is None],
            target_parameters=[one.name for one in wanted if one.specs[0].index is not None] or None,
        )
        with _names_as_they_are(model):
            self._adapted: Any = get_peft_model(model, config)
        return self._adapted  # type: ignore[no-any-return]

    def without_adapter(self, targets: list[Target]) -> str | None:
        wanted = chosen(targets, self.targets)
        fused = [one.name for one in wanted if one.specs[0].index is not None]
        beside = [one.name for one in wanted if one.specs[0].index is None and not attends(one.place or "")]
        if fused and beside:
            return (
                f"peft would take {beside[0]} for an expert's matrix when it reads the adapter; set targets=attention"
            )
        return None

    def save_adapter(self, folder: Path) -> None:
        self._adapted.save_pretrained(folder)

    def merge(self, model: nn.Module) -> None:
        # in float32, whatever the frozen weights were held in
        self._adapted.float().merge_and_unload()

    def _check_fused(self, targets: list[Target]) -> None:
        fused = [one.name for one in chosen(targets, self.targets) if one.specs[0].index is not None]
        if fused and self.dropout > 0:
            raise UserError(
                f"dropout={self.dropout} cannot be had on fused experts ({fused[0]}): set dropout=0, or targets=attention"
            )


@dataclass
class MergeThenMask(Lora):
    """Ordinary LoRA on a sparse model, whose zeros are put back after merging: what it learned there is lost.

    The report says how much that cost on the held-out text (`masked` and `spp` lose nothing).
    """

    def check(self, targets: list[Target]) -> None:
        self._check_fused(targets)


@contextlib.contextmanager
def _names_as_they_are(model: PreTrainedModel) -> Iterator[None]:
    """Hide the model's type from PEFT, which by it takes names of dense MLPs for those that experts had once."""
    kind = model.config.model_type
    model.config.model_type = ""
    try:
        yield
    finally:
        model.config.model_type = kind
