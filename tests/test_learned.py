"""Kinds that learn a smaller shape: what they go by, and that their runs resume and can be shared by processes."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from runner import Forked, cli, product
from safetensors.torch import load_file
from trainings import dies_before_step, on_processes
from transformers import AutoModelForCausalLM

import llmprune
from llmprune import UserError
from llmprune.arch.roles import Roles
from llmprune.arch.units import CHANNEL, EXPERT_CHANNEL, KV_GROUP, find_units
from llmprune.recovery import make_kind
from llmprune.recovery.lorashear import EPSILON, PERIODS, Projected
from llmprune.recovery.zeros import find_targets

pytest.importorskip("accelerate")

DEMO = Path(llmprune.__file__).parent / "demo" / "model"
LEARNED = ["sheared", "compresso", "loraprune", "lorashear"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((DEMO.parent / "calibration.txt").read_text()[:6000])
    return f"file:{path}"


def command(how: str, text: str, steps: int, out: Path) -> tuple[object, ...]:
    return ("recover", DEMO, "--how", how, "--set", "ratio=0.3", "--data", text, "--seqlen", 32, "--steps", steps,
            "--batch-size", 4, "--set", "training.evaluate_every=2", "--set", "training.micro_batch=1",
            "--device", "cpu", "--out", out)  # fmt: skip


@pytest.mark.parametrize("how", LEARNED)
def test_a_killed_run_resumes_to_the_same_bytes(how: str, text: str, tmp_path: Path) -> None:
    """Killed in the ramp, when units are half on their way out."""
    assert cli(*command(how, text, 8, tmp_path / "whole")).code == 0
    cut = command(how, text, 8, tmp_path / "cut")
    assert Forked(*cut, log=tmp_path / "log", before=dies_before_step(3)).wait().code == -signal.SIGKILL
    ran = cli(*cut, "--resume")
    assert ran.code == 0 and "resuming at step 2 of 8" in ran.err, ran.err
    assert product(tmp_path / "cut") == product(tmp_path / "whole")


@pytest.mark.parametrize("how", LEARNED)
def test_two_processes_make_the_losses_of_one(how: str, text: str, tmp_path: Path) -> None:
    for name, count in (("one", 1), ("two", 2)):
        for ran in on_processes(count, *command(how, text, 6, tmp_path / name), log=tmp_path / f"log-{name}"):
            assert ran.code == 0, ran.err
    found = [json.loads((tmp_path / name / "llmprune.json").read_text())["recovery"][-1] for name in ("one", "two")]
    assert [one["run"]["processes"] for one in found] == [1, 2]
    for single, both in zip(*(one["curve"] for one in found), strict=True):
        # the same sums in another order, in float32
        for key in ("loss", "perplexity"):
            assert both[key] == (single[key] and pytest.approx(single[key], rel=1e-5))
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert all(torch.allclose(weights[1][key], one, atol=1e-4) for key, one in weights[0].items())


@pytest.mark.parametrize("how", ["loraprune", "lorashear"])
def test_a_smaller_plain_model_comes_out(how: str, text: str, tmp_path: Path) -> None:
    result = llmprune.recover(DEMO, how=how, ratio=0.3, data=text, out=tmp_path / "out", seqlen=32, steps=6,
                              batch_size=4, **{"training.evaluate_every": 2})  # fmt: skip
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # the shape is that which a width method has for this amount
    width = llmprune.prune(DEMO, method="group-magnitude", ratio=0.3, out=tmp_path / "width").report
    assert result.report["totals"]["params_after"] == width["totals"]["params_after"]
    assert sum(one.numel() for one in small.parameters()) == width["totals"]["params_after"]
    entry = result.report["recovery"][-1]
    # cutting out what is masked changes nothing: float32 sums with and without zeros
    assert entry["held_out"]["stored"] == pytest.approx(entry["held_out"]["trained"], rel=1e-4)


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


def test_too_much_protection_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"protect=0\.9: at most 0\.7"):
        llmprune.recover(DEMO, how="lorashear", ratio=0.3, protect=0.9, data=text, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
