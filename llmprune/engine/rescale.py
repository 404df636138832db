"""Fit the scale and the bias of what a layer's MLP puts out, channel by channel, in closed form."""

from __future__ import annotations

import torch

from llmprune.arch.discover import Unit
from llmprune.arch.sublayers import MLP, halves
from llmprune.engine.fold import output_axis
from llmprune.engine.reconstruct import output_of, squared
from llmprune.engine.suspend import Calls
from llmprune.engine.trunk import silenced


def rescale(
    unit: Unit, storage: dict[str, torch.dtype], calls: Calls, targets: list[torch.Tensor]
) -> tuple[dict[str, torch.Tensor], float, float]:
    """New values of the matrices that the MLP of a loaded layer writes with: rows scaled, zeros where they were.

    A layer's output is h + m, m what its MLP adds. For each channel the scale s (and, where the class has one, the bias b)
    minimises |h + s m + b - target|^2 over all tokens: simple regression of target - h on m. `storage`: dtypes in which
    parameters will be stored; `calls`: arguments and present output of each batch. Returns the values as they will be
    read back, by name in the layer, and the relative squared error (of the targets' energy) before and after; no values
    if that did not fall, as where a norm follows the MLP.
    """
    module, writers = unit.module, halves(unit.module)[MLP]
    bias = next((name for name in writers.parameters if module.get_parameter(name).dim() == 1), None)
    sums_SD = torch.zeros(5, targets[0].shape[-1], dtype=torch.float64, device=targets[0].device)
    for (call, now), target in zip(calls, targets, strict=True):
        with silenced(writers.modules(module)):
            base = output_of(module, {}, call)
        m_TD, r_TD = ((one.double() - base.double()).flatten(0, -2) for one in (now, target))
        parts = (torch.ones_like(m_TD), m_TD, r_TD, m_TD.square(), m_TD * r_TD)
        sums_SD += torch.stack([one.sum(0) for one in parts])
    scale_D, shift_D = _regression(sums_SD, intercept=bias is not None)
    values = {}
    for name in writers.parameters:
        value, axis = module.get_parameter(name).detach(), output_axis(unit, name, len(scale_D))
        scaled = (value.double().movedim(axis, -1) * scale_D).movedim(-1, axis)
        scaled = scaled + shift_D if name == bias else scaled.masked_fill(value == 0, 0)
        values[name] = scaled.to(storage[name]).float().contiguous()
    energy = sum(float(one.float().square().sum()) for one in targets)
    before = sum(float(squared(now, target)) for (_, now), target in zip(calls, targets, strict=True)) / energy
    after = sum(
        float(squared(output_of(module, values, call), target))
        for (call, _), target in zip(calls, targets, strict=True)
    ) / energy  # fmt: skip
    return (values, before, after) if after < before else ({}, before, before)


def _regression(sums_SD: torch.Tensor, *, intercept: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Slope and intercept of r on m in every channel, from the sums over tokens of 1, m, r, m^2 and m r."""
    n_D, m_D, r_D, mm_D, mr_D = sums_SD
    scale_D = (n_D * mr_D - m_D * r_D) / (n_D * mm_D - m_D.square()) if intercept else mr_D / mm_D
    # a channel in which nothing varies has no scale to find
    scale_D = torch.where(scale_D.isfinite(), scale_D, 1.0)
    return scale_D, (r_D - scale_D * m_D) / n_D if intercept else torch.zeros_like(m_D)
