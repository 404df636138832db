"""Fit the kept weights of one decoder layer to the dense layer's output, by gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.func import functional_call

from llmprune.engine.share import Share
from llmprune.engine.suspend import Call, Calls, first_tensor

# step length at its peak, as a share of the root mean square of a matrix's kept weights
RATE = 0.02
BETAS = (0.9, 0.99)
WARM_UP = 4


def reconstruct(
    module: nn.Module,
    places: Mapping[str, list[torch.Tensor]],
    kept: dict[str, torch.Tensor],
    storage: dict[str, torch.dtype],
    calls: Calls,
    targets: list[torch.Tensor],
    *,
    epochs: int,
    seed: int,
    share: Share,
) -> tuple[float, float]:
    """Change weights of `module` in place so that its outputs on `calls` come closer to `targets`, with the same zeros.

    `places`: where the values of all that may change lie, by name in the module (see `Weights`); `kept`: bool masks of the
    same shapes; `storage`: dtypes in which they will be stored; `calls`: arguments and present output of each batch of
    `share`. Adam on the squared error, one batch a step, `epochs` times through all batches in an order drawn from `seed`;
    the step length rises over the first steps and falls along a half cosine. Every process of the share adds its part of
    the gradient. Needs one layer's parameters four times in float32 (values, gradients, two moments) and the activations
    of one batch. Returns the relative squared error (of the targets' energy) before, and after with the weights as they
    will be read back; if that did not fall, all stay as they are.
    """
    energy = share.add_up(float(one.float().square().sum()) for one in targets)
    before = share.add_up(float(squared(now, target)) for (_, now), target in zip(calls, targets, strict=True)) / energy
    start = {name: ones[-1].detach().to(ones[0].device).float() for name, ones in places.items()}
    rates = {name: RATE * float(one[kept[name]].square().mean().sqrt()) for name, one in start.items()}
    if not any(rates.values()):
        return before, before
    values = {name: one.clone().requires_grad_() for name, one in start.items()}
    optimizer = torch.optim.Adam(
        [{"params": [values[name]], "lr": rate} for name, rate in rates.items() if rate > 0], betas=BETAS
    )
    order = _order(share.all_numbers(), epochs, seed)
    shape = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, len(order)))
    mine = {number: place for place, number in enumerate(share.numbers)}
    for number in order:
        if number in mine:
            call, target = calls[mine[number]][0], targets[mine[number]]
            with torch.enable_grad():
                loss = squared(output_of(module, values, call), target) / energy
                loss.backward()  # type: ignore[no-untyped-call]
        _add_up_gradients(values, kept, share)
        optimizer.step()
        optimizer.zero_grad()
        shape.step()
    found = {name: one.detach().to(storage[name]).masked_fill(~kept[name], 0).float() for name, one in values.items()}
    with torch.no_grad():
        fitted = (output_of(module, found, call) for call, _ in calls)
        after = share.add_up(float(squared(now, target)) for now, target in zip(fitted, targets, strict=True)) / energy
        if not after < before:  # also where one is NaN
            return before, before
        for name, ones in places.items():
            for one in ones:
                one.copy_(found[name])
    return before, after


def _order(numbers: list[int], epochs: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [numbers[one] for _ in range(epochs) for one in torch.randperm(len(numbers), generator=generator).tolist()]


def _add_up_gradients(values: dict[str, torch.Tensor], kept: dict[str, torch.Tensor], share: Share) -> None:
    # a parameter that no process used in this step (an unseen expert) takes no step
    used = torch.tensor([one.grad is not None for one in values.values()], dtype=torch.int32)
    share.ranks.sum_(used)
    for (name, one), uses in zip(values.items(), used.tolist(), strict=True):
        if uses:
            one.grad = torch.zeros_like(one) if one.grad is None else one.grad
            share.ranks.sum_(one.grad)
            one.grad.mul_(kept[name])


def _rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))


def output_of(module: nn.Module, values: dict[str, torch.Tensor], call: Call) -> torch.Tensor:
    """What a layer puts out with other values of some of its parameters."""
    args, kwargs = call
    dtypes = dict(module.named_parameters())
    cast = {name: one.to(dtypes[name].dtype) for name, one in values.items()}
    return first_tensor(functional_call(module, cast, args, kwargs))


def squared(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The squared distance of two tensors, summed in float32."""
    return (output.float() - target.float()).square().sum()
