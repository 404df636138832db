"""Matrices with their inputs, and models with theirs, from which units are taken out."""

from __future__ import annotations

import tiny
import torch
from transformers import PreTrainedModel

from llmprune.arch.discover import find_units as layers_of
from llmprune.arch.roles import Roles
from llmprune.arch.units import CHANNEL, KV_GROUP, find_units
from llmprune.engine.trunk import Trunk
from llmprune.methods.structural import Narrow
from llmprune.weights import Resident


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights 7 x 12 and 60 correlated inputs with a mean."""
    x_TI = draw(60, 12, seed=seed) @ (torch.eye(12, dtype=torch.float64) + 0.3 * draw(12, 12, seed=seed + 1)) + 0.5
    return draw(7, 12, seed=seed + 2), x_TI


def error(x_TI: torch.Tensor, change_OI: torch.Tensor) -> float:
    return float((x_TI @ change_OI.T).square().sum())


def mask(gone: list[int], columns_UN: torch.Tensor) -> torch.Tensor:
    found = torch.zeros(12, dtype=torch.bool)
    found[columns_UN[gone].flatten()] = True
    return found


# Scores of whole models.


def setting(model: PreTrainedModel, rows: int = 4) -> tuple[Trunk, Narrow]:
    model.requires_grad_(False)
    batches = [{"input_ids": tiny.tokens(rows, 10, seed=3)}]
    roles = Roles(model)
    units = {(one.layer, one.kind): one for one in find_units(roles, [KV_GROUP, CHANNEL])}
    asked = Narrow(roles, units, lambda _: dict.fromkeys(units, 0), False, lambda _: None)
    return Trunk(model, layers_of(model, head=False), batches, Resident(model)), asked
