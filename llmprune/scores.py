"""How much a single weight matters: one function a score, in float32, low meaning that it can go.

Every function takes the weights (outputs x inputs), the statistics of the inputs and a key that tells
one matrix (and one seed) from another, and answers scores of the same shape. A new score is a function
and a line of the table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import torch

from llmprune.statistics import MOMENTS, Stats


def magnitude(weight_OI: torch.Tensor, stats: Stats | None = None, key: str = "") -> torch.Tensor:
    """|w|."""
    return weight_OI.abs()


def wanda(weight_OI: torch.Tensor, stats: Stats, key: str = "") -> torch.Tensor:
    """|w_ij| * ||x_j||, whose square is the loss of removing that weight alone (Sun et al. 2023, eq. 1)."""
    return weight_OI.abs() * stats.square_sums_I.sqrt()


def wanda_adaptive(weight_OI: torch.Tensor, stats: Stats, key: str = "") -> torch.Tensor:
    """The share of its row's total that Wanda's scores reach up to this weight, from the lowest.

    Removing the lowest of these over a matrix is Wanda's row-adaptive variant: every row loses the prefix
    whose score adds up to at most alpha of the row's, with the alpha that gives the exact count.
    """
    ranked_OI = wanda(weight_OI, stats).sort(dim=1, stable=True)
    reached_OI = ranked_OI.values.double().cumsum(1)
    share_OI = reached_OI / reached_OI[:, -1:].clamp_min(torch.finfo(torch.float32).tiny)
    return torch.zeros_like(share_OI).scatter_(1, ranked_OI.indices, share_OI)


def ria(weight_OI: torch.Tensor, stats: Stats, key: str = "") -> torch.Tensor:
    """(|w_ij| / sum of column j + |w_ij| / sum of row i) * ||x_j||^0.5 (RIA, Zhang et al. 2024)."""
    size_OI = weight_OI.abs()
    tiny = torch.finfo(torch.float32).tiny
    column_1I, row_O1 = size_OI.sum(0, keepdim=True).clamp_min(tiny), size_OI.sum(1, keepdim=True).clamp_min(tiny)
    return (size_OI / column_1I + size_OI / row_O1) * stats.square_sums_I.pow(0.25)


def activation(weight_OI: torch.Tensor, stats: Stats, key: str = "") -> torch.Tensor:
    """||x_j|| alone: whole inputs go, and only what is left over is shared out by position."""
    return stats.square_sums_I.sqrt().expand_as(weight_OI)


def random(weight_OI: torch.Tensor, stats: Stats | None = None, key: str = "") -> torch.Tensor:
    """Uniform noise drawn from `key` alone, so that neither order nor device matters: the honest baseline."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
    return torch.rand(weight_OI.shape, generator=torch.Generator().manual_seed(seed)).to(weight_OI.device)


class Score(NamedTuple):
    """A score, the statistics it needs, and within what it is compared: "matrix" or "row"."""

    of: Callable[..., torch.Tensor]
    needs: frozenset[str]
    group: str


SCORES = {
    "magnitude": Score(magnitude, frozenset(), "matrix"),
    "wanda": Score(wanda, frozenset({MOMENTS}), "row"),
    "wanda-adaptive": Score(wanda_adaptive, frozenset({MOMENTS}), "matrix"),
    "ria": Score(ria, frozenset({MOMENTS}), "matrix"),
    "activation": Score(activation, frozenset({MOMENTS}), "row"),
    "random": Score(random, frozenset(), "row"),
}
