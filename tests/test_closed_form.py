"""What a layer writes with, fitted in closed form: against least squares in float64, and never a larger error."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from llmprune.arch.discover import find_units
from llmprune.engine.closed_form import DAMPING, fit_layer, refit_gain, refit_writer
from llmprune.engine.reconstruct import output_of
from llmprune.engine.rescale import rescale
from llmprune.engine.search import run_without
from llmprune.engine.trunk import Trunk
from llmprune.weights import Resident


def pruned_layer(name: str) -> tuple[Trunk, list[Any], list[torch.Tensor]]:
    """A tiny model with half of its first layer's weights zeroed; that layer's calls, and the dense one's outputs."""
    model = tiny.build(name)
    units = find_units(model, head=False)
    batches = [{"input_ids": tiny.tokens(4, 20, seed=seed)} for seed in range(2)]
    trunk = Trunk(model, units, batches, Resident(model))
    states = trunk.enter()
    targets = trunk.run(0, states)
    for parameter in units[0].module.parameters():
        if parameter.dim() > 1:
            parameter.masked_fill_(parameter.abs() < parameter.abs().median(), 0)
    calls = [(trunk.call(0, number, state), trunk.apply(0, number, state)) for number, state in enumerate(states)]
    return trunk, calls, targets


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gpt-oss"])
@torch.no_grad()
def test_scales_and_biases_are_least_squares(name: str) -> None:
    """Each output channel by itself, by LAPACK in float64; no other scale or bias does better."""
    trunk, calls, targets = pruned_layer(name)
    unit, states = trunk.units[0], trunk.enter()
    storage = dict.fromkeys(dict(unit.module.named_parameters()), torch.float32)
    values, before, after = rescale(unit, storage, calls, targets)
    base = torch.cat([one.flatten(0, 1) for one in run_without(trunk, 0, states, {(0, "mlp")})]).double()
    now, target = (
        torch.cat([one.flatten(0, 1) for one in some]).double() for some in ([one for _, one in calls], targets)
    )
    biased = name in ("opt", "gpt2")
    least = 0.0
    zeros = {key: unit.module.get_parameter(key) == 0 for key in values}
    for m_T, r_T in zip((now - base).T, (target - base).T, strict=True):
        design_TP = torch.stack([m_T, torch.ones_like(m_T)] if biased else [m_T], 1)
        found = torch.linalg.lstsq(design_TP, r_T).solution
        least += float((design_TP @ found - r_T).square().sum())
    # float32 forwards
    assert after == pytest.approx(least / float(target.square().sum()), rel=1e-4) and after < before
    assert all(torch.equal(values[key] == 0, zero) for key, zero in zeros.items() if values[key].dim() > 1)
    # an error that cannot fall leaves everything as it is
    again, same, _ = rescale(unit, storage, calls, [now for _, now in calls])
    assert again == {} and same == 0


@pytest.mark.parametrize(("name", "path"), [("llama", "mlp.down_proj"), ("llama", "self_attn.o_proj"), ("opt", "fc2"),
                                            ("gpt2", "mlp.c_proj"), ("gpt-neox", "attention.dense")])  # fmt: skip
@torch.no_grad()
def test_writers_are_least_squares_on_their_mask(name: str, path: str) -> None:
    """Row by row, on the kept inputs only, by LAPACK in float64."""
    trunk, calls, targets = pruned_layer(name)
    unit = trunk.units[0]
    storage = {key: torch.float32 for key, _ in unit.module.named_parameters()}
    inputs: list[torch.Tensor] = []
    hook = unit.module.get_submodule(path).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    lacks = [target - output_of(unit.module, {}, call) for (call, _), target in zip(calls, targets, strict=True)]
    hook.remove()
    found = refit_writer(unit, path, storage, calls, targets)
    x_TI, lack_TO = (torch.cat([one.flatten(0, -2) for one in some]).double() for some in (inputs, lacks))
    weight, new = unit.module.get_parameter(f"{path}.weight").double(), found[f"{path}.weight"].double()
    weight_OI, new_OI = (weight.T, new.T) if name == "gpt2" else (weight, new)
    assert torch.equal(new_OI == 0, weight_OI == 0)
    if biased := f"{path}.bias" in storage:
        x_TI = torch.cat([x_TI, torch.ones_like(x_TI[:, :1])], 1)
        weight_OI, new_OI = (
            torch.cat([one, bias.double()[:, None]], 1)
            for one, bias in (
                (weight_OI, unit.module.get_parameter(f"{path}.bias")),
                (new_OI, found[f"{path}.bias"]),
            )
        )
    damping_II = (DAMPING * x_TI.square().sum(0)).sqrt().diag()
    for row, (old_I, mine_I) in enumerate(zip(weight_OI, new_OI, strict=True)):
        kept_I = old_I != 0
        kept_I[len(kept_I) - biased :] = True
        design = torch.cat([x_TI, damping_II])[:, kept_I]
        goal = torch.cat([x_TI @ old_I + lack_TO[:, row], damping_II @ old_I])
        best = torch.linalg.lstsq(design, goal).solution
        # what conjugate gradients leave at a relative gradient of 1e-4, where no curvature is below the damping
        assert torch.allclose(mine_I[kept_I], best, rtol=0, atol=1e-4 / DAMPING * float(best.abs().max()))
        left = [float((design @ one - goal).square().sum()) for one in (mine_I[kept_I], best)]
        assert left[0] == pytest.approx(left[1], rel=1e-5)


@torch.no_grad()
def test_the_gain_of_a_last_norm_is_a_regression() -> None:
    """Gemma's gain is 1 + g, on what the MLP puts out; other vectors have no closed form and stay."""
    trunk, calls, targets = pruned_layer("gemma3")
    unit = trunk.units[0]
    name = "post_feedforward_layernorm.weight"
    storage = {key: torch.float32 for key, _ in unit.module.named_parameters()}
    added: list[torch.Tensor] = []
    hook = unit.module.post_feedforward_layernorm.register_forward_hook(lambda *seen: added.append(seen[2]))
    for call, _ in calls:
        output_of(unit.module, {}, call)
    hook.remove()
    old_D = unit.module.get_parameter(name).double()
    m_TD, r_TD = (
        torch.cat([one.double().flatten(0, -2) for one in some])
        for some in (added, [target - now + m for (_, now), target, m in zip(calls, targets, added, strict=True)])
    )
    expected_D = (m_TD * r_TD).sum(0) / m_TD.square().sum(0) * (1 + old_D) - 1
    # float32 forwards
    found = refit_gain(unit, name, storage, calls, targets)
    assert torch.allclose(found[name].double(), expected_D, rtol=1e-3, atol=1e-4)
    for other in ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm"):
        assert refit_gain(unit, f"{other}.weight", storage, calls, targets) == {}


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-neox", "mixtral", "phi3"])
@torch.no_grad()
def test_the_closed_form_never_raises_an_error(name: str) -> None:
    trunk, calls, targets = pruned_layer(name)
    unit = trunk.units[0]
    storage = {key: torch.bfloat16 for key, _ in unit.module.named_parameters()}
    zeros = {key: one == 0 for key, one in unit.module.named_parameters() if one.dim() > 1}
    before, after = fit_layer(unit, storage, calls, targets)

    def error() -> float:
        missed = [output_of(unit.module, {}, call) - target for (call, _), target in zip(calls, targets, strict=True)]
        return sum(float(one.square().sum()) for one in missed) / sum(float(one.square().sum()) for one in targets)

    assert after <= before and error() == pytest.approx(after, rel=1e-5)
    assert after < before
    assert all(torch.equal(unit.module.get_parameter(key) == 0, zero) for key, zero in zeros.items())
    again = fit_layer(unit, storage, [(call, output_of(unit.module, {}, call)) for call, _ in calls], targets)
    assert again[1] <= again[0] == pytest.approx(after, rel=1e-5)
