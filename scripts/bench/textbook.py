"""SparseGPT as its paper has it, in plain torch: what the GPU times of this library are held against."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from llmprune import masks
from llmprune.arch.discover import find_units
from llmprune.types import Budget

BLOCK, DAMPING = 128, 0.01


@torch.no_grad()
def prune_layer(model: PreTrainedModel, tokens: list[torch.Tensor], budget: Budget) -> None:
    """A model of one layer: an X'X for every linear layer, then column by column, then the outputs once more."""
    (unit,) = find_units(model, head=False)
    linears = {name: one for name, one in unit.module.named_modules() if isinstance(one, nn.Linear)}
    grams = {name: torch.zeros(one.in_features, one.in_features, device=model.device) for name, one in linears.items()}

    def adding(name: str) -> Callable[..., None]:
        return lambda module, args: add_to_gram(grams[name], args[0].flatten(0, -2))

    with contextlib.ExitStack() as stack:
        for name, one in linears.items():
            stack.callback(one.register_forward_pre_hook(adding(name)).remove)
        run(model, tokens)
    for name, one in linears.items():
        one.weight.copy_(prune_matrix(one.weight.float(), grams[name], budget))
    run(model, tokens)


def run(model: PreTrainedModel, tokens: list[torch.Tensor]) -> None:
    for ids in tokens:
        model.model(input_ids=ids[None].to(model.device), use_cache=False)


def add_to_gram(gram_II: torch.Tensor, x_TI: torch.Tensor) -> None:
    """The whole square, in float32."""
    gram_II.addmm_(x_TI.float().T, x_TI.float())


def prune_matrix(weight_OI: torch.Tensor, gram_II: torch.Tensor, budget: Budget) -> torch.Tensor:
    """Algorithm 1 of Frantar and Alistarh 2023 (SparseGPT), right-looking, one column after the other."""
    weight_OI, inputs = weight_OI.clone(), len(gram_II)
    gram_II.diagonal().add_(DAMPING * gram_II.diagonal().mean())
    inverse_II = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram_II)), upper=True)
    for start in range(0, inputs, BLOCK):
        end = min(start + BLOCK, inputs)
        block_OB, upper_BB = weight_OI[:, start:end].clone(), inverse_II[start:end, start:end]
        error_OB = torch.zeros_like(block_OB)
        diagonal_B = upper_BB.diagonal()
        pruned_OB = masks.select((block_OB / diagonal_B).square(), budget, by="matrix")
        group = budget.pattern.group
        for column in range(end - start):
            if group and column % group == 0:
                here = slice(column, column + group)
                pruned_OB[:, here] = masks.select((block_OB[:, here] / diagonal_B[here]).square(), budget, by="row")
            kept_O = block_OB[:, column].masked_fill(pruned_OB[:, column], 0)
            error_O = (block_OB[:, column] - kept_O) / diagonal_B[column]
            block_OB[:, column:] -= error_O[:, None] * upper_BB[column, column:]
            block_OB[:, column] = kept_O
            error_OB[:, column] = error_O
        weight_OI[:, start:end] = block_OB
        weight_OI[:, end:] -= error_OB @ inverse_II[start:end, end:]
    return weight_OI
