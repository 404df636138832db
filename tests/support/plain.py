"""The inputs of every matrix of a model, from its plain forward: what the engine's statistics are checked against.

Hooks on nn.Linear and Conv1D see most of them; those of fused experts are recomputed in float64 from the
call of the expert block. Nothing here imports llmprune. U is the unit roundoff of float32: a sum of n
rounded terms errs by at most (n + 1) * U * (sum of absolute values), to first order and in any order.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tiny
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

U = 2.0**-24

Batch = dict[str, torch.Tensor]


class Inputs(NamedTuple):
    """The inputs of a matrix in float64, and by how much a float32 forward may miss each of them."""

    x_TI: np.ndarray
    error_TI: np.ndarray


@contextlib.contextmanager
def eager_experts(model: PreTrainedModel) -> Iterator[None]:
    """While active, experts run one after the other, as in the engine, so that outputs can be equal to the bit."""
    before = getattr(model.config, "_experts_implementation", None)
    model.config._experts_implementation = "eager"
    try:
        yield
    finally:
        model.config._experts_implementation = before


def logits(model: PreTrainedModel, batches: list[Batch]) -> list[torch.Tensor]:
    with torch.no_grad(), eager_experts(model):
        return [model(**batch, use_cache=False).logits for batch in batches]


def inputs(name: str, model: PreTrainedModel, batches: list[Batch], *, everyone: bool = False) -> dict[str, Inputs]:
    """The inputs of every linear map and of every fused expert of `model`, one of `tiny.TINY`.

    `everyone`: what fused experts would see if every token went through every expert.
    """
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)
    calls: dict[str, list[tuple[torch.Tensor, ...]]] = defaultdict(list)

    def watch(path: str, module: nn.Module) -> Iterator[Any]:
        if path.endswith(".experts"):
            yield module.register_forward_pre_hook(
                lambda _, args: calls[path].append(tuple(one.clone() for one in args))
            )
        if isinstance(module, nn.Linear | Conv1D):
            yield module.register_forward_pre_hook(lambda _, args: seen[f"{path}.weight"].append(args[0].clone()))
        if path.endswith(".x_proj"):  # Mamba multiplies by dt_proj.weight without calling dt_proj
            step, rank = path.replace("x_proj", "dt_proj.weight"), model.config.time_step_rank
            yield module.register_forward_hook(lambda _, args, out: seen[step].append(out[..., :rank].clone()))

    hooks = [hook for path, module in model.named_modules() for hook in watch(path, module)]
    logits(model, batches)
    for hook in hooks:
        hook.remove()
    found = {path: exact(torch.cat([one.flatten(0, -2) for one in tensors])) for path, tensors in seen.items()}
    for path, each in calls.items():
        block = model.get_submodule(path)
        for expert in range(tiny.EXPERTS):
            pairs = [_of_expert(name, block, args, expert, everyone) for args in each]
            for which, part in enumerate(("gate_up_proj", "down_proj")):
                parts = zip(*(pair[which] for pair in pairs), strict=True)
                found[f"{path}.{part}[{expert}]"] = Inputs(*map(np.concatenate, parts))
    return found


def exact(x_TI: torch.Tensor) -> Inputs:
    return Inputs(x_TI.double().numpy(), np.zeros(x_TI.shape))


def _of_expert(
    name: str, block: nn.Module, args: tuple[torch.Tensor, ...], expert: int, everyone: bool
) -> tuple[Inputs, Inputs]:
    """What one fused expert multiplies by its gate_up and by its down matrix, from the call of its block."""
    hidden_TI = args[0].double().numpy()
    if name == "llama4":  # every expert gets its own copy of all tokens, times zero where it was not chosen
        x_TI = hidden_TI.reshape(tiny.EXPERTS, -1, hidden_TI.shape[-1])[expert]
        x_TI = x_TI[np.abs(x_TI).sum(1) > 0]
    else:
        x_TI = hidden_TI if everyone else hidden_TI[(args[1] == expert).any(1).numpy()]
    w_IO = block.gate_up_proj[expert].detach().double().numpy()
    w_IO = w_IO if name in tiny.INPUTS_FIRST else w_IO.T
    bias_O = block.gate_up_proj_bias[expert].detach().double().numpy() if name == "gpt-oss" else np.zeros(w_IO.shape[1])
    both_TO = x_TI @ w_IO + bias_O
    error_TO = (x_TI.shape[1] + 2) * U * (np.abs(x_TI) @ np.abs(w_IO) + np.abs(bias_O))
    if name == "gpt-oss":
        (gate, up), (gate_error, up_error) = ((one[:, ::2], one[:, 1::2]) for one in (both_TO, error_TO))
        gate, up = np.minimum(gate, block.limit), np.clip(up, -block.limit, block.limit) + 1
        slope = block.alpha
    else:
        (gate, up), (gate_error, up_error) = np.split(both_TO, 2, 1), np.split(error_TO, 2, 1)
        slope = 1.0
    act = gate / (1 + np.exp(-slope * gate))
    # |d act / d gate| <= 1.1, whatever the slope; 16 U for the sigmoid and the products; twice for second order
    error = 2 * (1.1 * gate_error * np.abs(up) + np.abs(act) * up_error + 16 * U * np.abs(act) * (1 + np.abs(up)))
    return Inputs(x_TI, np.zeros_like(x_TI)), Inputs(act * up, error)


def assert_gram(gram_II: torch.Tensor, inputs: Inputs, name: str) -> None:
    """|G - X'X| is within what float32 may do to the sum and to the inputs themselves."""
    error_TI = inputs.error_TI
    size_TI = np.abs(inputs.x_TI) + error_TI
    bound_II = (len(size_TI) + 1) * U * (size_TI.T @ size_TI) + error_TI.T @ size_TI + size_TI.T @ error_TI
    distance_II = np.abs(gram_II.double().numpy() - inputs.x_TI.T @ inputs.x_TI)
    assert np.all(distance_II <= bound_II), f"{name}: {(distance_II / bound_II).max()} times the bound"
