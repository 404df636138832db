"""Factors for rows and columns of the weights themselves, so that a zero stays one by construction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from llmprune.recovery.masked import Adapters
from llmprune.recovery.zeros import Target, chosen


class Factors(nn.Module):
    """W * (1 + scale * rows * columns), for a weight of shape (…, R, C).

    `rows` is R x 1 and starts at zero; `columns` is rank x C, each of its rows for R / rank consecutive rows of W.
    """

    def __init__(
        self, shape: torch.Size, rank: int, scale: float, place: torch.device, random: torch.Generator
    ) -> None:
        super().__init__()
        *experts, count, columns = shape
        self.scale = scale
        self.repeats = math.ceil(count / rank)
        bound = 1 / math.sqrt(columns)
        start = torch.empty(*experts, rank, columns).uniform_(-bound, bound, generator=random)
        self.columns = nn.Parameter(start.to(place))
        self.rows = nn.Parameter(torch.zeros(*experts, count, 1, device=place))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        columns = self.columns.repeat_interleave(self.repeats, -2)[..., : weight.shape[-2], :]
        return (weight.float() * (1 + self.scale * self.rows * columns)).to(weight.dtype)


@dataclass
class Spp(Adapters):
    """SPP (Lu et al. 2024, arXiv:2405.16057): a factor for each row, and factors for each column of some rows.

    `alpha` scales the product of the factors. `targets`: "all-linear", "attention" or "mlp".
    """

    learning_rate: ClassVar[float] = 1e-2

    rank: int = 16
    alpha: float = 16.0
    targets: str = "all-linear"
    seed: int = 0

    def prepare(self, model: PreTrainedModel, targets: list[Target]) -> nn.Module:
        random = torch.Generator().manual_seed(self.seed)
        return self.wrap(
            model,
            chosen(targets, self.targets),
            lambda one: Factors(one.kept.shape, self.rank, self.alpha, one.kept.device, random),
        )
