"""LoRAPrune and LoRAShear: by what units go, and how they become zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import llmprune
from llmprune import UserError
from llmprune.arch.roles import Roles
from llmprune.arch.units import CHANNEL, EXPERT_CHANNEL, KV_GROUP, find_units
from llmprune.recovery import make_kind
from llmprune.recovery.lorashear import EPSILON, PERIODS, Projected
from llmprune.recovery.zeros import find_targets

pytest.importorskip("accelerate")

DEMO = Path(llmprune.__file__).parent / "demo" / "model"


# LoRAPrune.


@pytest.mark.parametrize(("layout", "kind", "ratio"), [("llama", KV_GROUP, 0.1), ("gpt2", CHANNEL, 0.3),
                                                       ("mixtral", EXPERT_CHANNEL, 0.3)])  # fmt: skip
def test_importance_has_its_closed_form(layout: str, kind: str, ratio: float) -> None:
    """In float64, from the gradient of the whole matrix, which LoRAPrune never has.

    With W + s B A and G = dL/d(W + s B A), dA = s B'G and dB = s G A'; so dB A + B dA - dB dA = s (G A'A + B B'G) -
    s^2 G A'B'G. In two parts of a batch, each with half of the loss.
    """
    model = tiny.build(layout).double()
    model.config._experts_implementation = "eager"  # others have no float64
    units = next(one for one in find_units(Roles(model), [kind]) if one.layer == 1)
    loraprune = make_kind("loraprune", {"ratio": ratio, "units": kind, "rank": 3}, 0)
    targets = find_targets(model)
    loraprune.prepare(model, targets)
    model.double()
    torch.manual_seed(0)
    for one in loraprune.adapters:
        torch.nn.init.normal_(one.b, std=0.1)
    names = {member.parameter for member in units.members}
    adapted = {target.name: (target, one) for target, one in zip(
        [one for one in targets if one.place is not None], loraprune.adapters, strict=True) if target.name in names}  # fmt: skip
    ids = torch.randint(0, model.config.vocab_size, (4, 16))
    for half in ids.chunk(2):
        (model(input_ids=half, labels=half).loss / 2).backward()
    mask = loraprune.masks[(1, kind)]
    found_U = mask.taken()
    assert float(mask.taken().abs().max()) == 0  # what was noted is spent

    expected_U = torch.zeros(units.count, dtype=torch.float64)
    whole = {name: whole_gradient(model, target, ids) for name, (target, _) in adapted.items()}
    for member in units.members:
        if member.parameter not in adapted:
            continue
        (_, one), (gradient, merged) = adapted[member.parameter], whole[member.parameter]
        a, b, s = one.a.detach(), one.b.detach(), one.scale
        closed = s * (gradient @ a.mT @ a + b @ b.mT @ gradient) - s**2 * gradient @ a.mT @ b.mT @ gradient
        importance = (closed * merged).abs()
        own_U = torch.zeros_like(expected_U)
        for unit, index_N in enumerate(member.index_UN.tolist()):
            matrix, axis = (importance[unit // units.size], member.axis - 1) if units.stacked else (importance, member.axis)  # fmt: skip
            own_U[unit] = matrix.index_select(axis, torch.tensor(index_N)).sum()
        runs = own_U.view(units.strata if units.stacked else 1, -1)
        expected_U += (runs / runs.norm(dim=1, keepdim=True)).flatten()
    # importance is held in float32
    assert torch.allclose(found_U.double(), expected_U, rtol=1e-4, atol=1e-6)


def whole_gradient(model: Any, target: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of the loss with respect to the merged matrix, and that matrix."""
    chain = target.owner.parametrizations[target.short]
    adapter, noted = chain[0], []
    hook = adapter.register_forward_hook(lambda module, args, out: noted.append(out) or out.retain_grad())
    loss = sum(model(input_ids=half, labels=half).loss / 2 for half in ids.chunk(2))
    loss.backward()
    hook.remove()
    return torch.stack([one.grad for one in noted if one.grad is not None]).sum(0), noted[0].detach()


# LoRAShear.


def projected() -> Projected:
    model = tiny.build("llama")
    units = next(one for one in find_units(Roles(model), [CHANNEL]) if one.layer == 1)
    mask = Projected(units, torch.device("cpu"))
    mask.score.copy_(torch.arange(units.count).float())
    return mask


def test_redundant_units_reach_zero_in_their_period_and_stay_there() -> None:
    mask = projected()
    mask.guard(2)
    mask.choose(3)
    mask.taken_U = torch.zeros(mask.count)
    for left in (4, 3, 2, 1):
        before = mask.factor.clone()
        mask.project(left)
        assert torch.allclose(mask.factor[:3], before[:3] * (1 - 1 / left)) and bool((mask.factor[3:] == 1).all())
    mask.score[:3] = 1e9  # whatever they seem to be worth now
    mask.score[3] = -0.5
    mask.choose(4)
    assert mask.gone() == [0, 1, 2, 3]
    mask.score[-2:] = -2.0
    mask.choose(mask.count - 2)
    assert mask.gone() == list(range(mask.count - 2))  # those that are guarded stay


def test_the_half_space_decides_what_becomes_zero() -> None:
    """One step against its definition: f~ = f - dL/df - f / left, zero where the projection on f w is too short."""
    mask = projected()
    mask.choose(mask.count)
    torch.manual_seed(0)
    factor_U = torch.rand(mask.count) * 0.9 + 0.1
    slope_U = torch.randn(mask.count) * 0.3
    mask.factor.copy_(factor_U)
    mask.taken_U = factor_U * slope_U  # what is noted is f dL/df
    mask.project(5)
    for unit in range(mask.count):
        f, slope = float(factor_U[unit]), float(slope_U[unit])
        trial = min(f - slope - f / 5, 1.0)
        # x = f w and x~ = f~ w: x'x~ >= epsilon |x|^2
        expected = trial if f * trial >= EPSILON * f * f else 0.0
        assert float(mask.factor[unit]) == pytest.approx(expected, abs=1e-6)
    assert 0 < int((mask.factor == 0).sum()) < mask.count


@pytest.mark.parametrize("steps", [1, 2, 6, 20, 41])
def test_amounts_are_met_at_the_end_of_the_ramp(steps: int) -> None:
    kind = make_kind("lorashear", {"ratio": 0.3}, 0)
    model = tiny.build("llama")
    kind.prepare(model, find_targets(model))
    gone = []
    for done in range(1, steps + 1):
        kind.after_step(done, steps)
        mask = kind.masks[(1, CHANNEL)]
        gone.append(len(mask.gone()))
        if kind.settled(done, steps):
            assert gone[-1] == kind.due((1, CHANNEL), 1.0)
            assert bool((mask.factor == mask.kept).all())
    assert gone == sorted(gone) and len(set(gone) - {0}) <= PERIODS


def test_too_much_protection_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"protect=0\.9: at most 0\.7"):
        llmprune.recover(DEMO, how="lorashear", ratio=0.3, protect=0.9, data="demo", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
