"""Low-rank adapters under the mask: what is trained is what is merged."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from llmprune.recovery.kind import Kind
from llmprune.recovery.zeros import Target, attach, chosen, detach


class MaskedLowRank(nn.Module):
    """W + mask * scale * B A, for a weight of shape (…, R, C); B starts at zero, so that the model starts unchanged."""

    kept: torch.Tensor

    def __init__(self, kept: torch.Tensor, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        *experts, rows, columns = kept.shape
        self.register_buffer("kept", kept, persistent=False)
        self.scale = scale
        bound = 1 / math.sqrt(columns)
        start = torch.empty(*experts, rank, columns).uniform_(-bound, bound, generator=generator)
        self.a = nn.Parameter(start.to(kept.device))
        self.b = nn.Parameter(torch.zeros(*experts, rows, rank, device=kept.device))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        change = (self.scale * (self.b @ self.a)).masked_fill(~self.kept, 0)
        return (weight.float() + change).to(weight.dtype)


class Adapters(Kind):
    """Kinds that train small modules beside frozen weights and compute each weight from both."""

    trains_base: ClassVar[bool] = False

    def wrap(self, model: PreTrainedModel, wanted: list[Target], make: Callable[[Target], nn.Module]) -> nn.Module:
        model.requires_grad_(False)
        self._targets = wanted
        for target, _ in attach(wanted, make):
            # what is computed from a frozen weight is trained all the same
            getattr(target.owner, "parametrizations")[target.short].original.requires_grad_(False)  # noqa: B009
        return model

    def merge(self, model: nn.Module) -> None:
        detach(self._targets)


@dataclass
class Masked(Adapters):
    """SparsePEFT (Muñoz et al. 2024, arXiv:2410.03750): LoRA whose product is masked in the forward pass.

    The zeros are those of the pruned model, so the merged model computes what the adapter did. `targets`:
    "all-linear", "attention" or "mlp".
    """

    learning_rate: ClassVar[float] = 1e-3

    rank: int = 16
    alpha: float = 32.0
    targets: str = "all-linear"
    seed: int = 0

    def prepare(self, model: PreTrainedModel, targets: list[Target]) -> nn.Module:
        generator = torch.Generator().manual_seed(self.seed)
        return self.wrap(
            model,
            chosen(targets, self.targets),
            lambda one: MaskedLowRank(one.kept, self.rank, self.alpha / self.rank, generator),
        )
