"""Tiny models whose layers are left out."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmprune.arch.discover import decoder_layers

TEXT = [row.tolist() for row in tiny.tokens(6, 20, seed=3)]


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def skip(model: PreTrainedModel, layers: list[int]) -> PreTrainedModel:
    """The model with some layers' forward replaced by nothing: the reference for every drop."""
    wrap = (lambda one: (one,)) if model.config.model_type in ("bloom", "gpt_neo") else (lambda one: one)
    for index in layers:
        decoder_layers(model)[1][index].forward = lambda hidden_states, *_, **__: wrap(hidden_states)
    return model
