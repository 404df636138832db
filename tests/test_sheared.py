"""Gates that are learned with the weights: their distribution, their price, and the smaller model that comes out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from runner import product
from transformers import AutoModelForCausalLM

import llmprune
from llmprune import UserError
from llmprune.arch.roles import Roles
from llmprune.arch.units import CHANNEL, EXPERT_CHANNEL, KV_GROUP, QUERY_HEAD, find_units
from llmprune.recovery.gates import Gate

pytest.importorskip("accelerate")
pytest.importorskip("peft")

DEMO = Path(llmprune.__file__).parent / "demo" / "model"
QUICK: dict[str, Any] = {"seqlen": 32, "steps": 6, "batch_size": 4, "training.evaluate_every": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((DEMO.parent / "calibration.txt").read_text()[:6000])
    return f"file:{path}"


def gate_of(name: str, kind: str, layer: int = 1) -> tuple[Gate, Any, Any]:
    model = tiny.build(name)
    units = next(one for one in find_units(Roles(model), [kind]) if one.layer == layer)
    return Gate(units, torch.device("cpu")), units, model


def test_factors_follow_the_hard_concrete_distribution() -> None:
    """Against the definition, in float64 on a grid of noise: shares of zeros and ones, and the mean."""
    gate, _, _ = gate_of("llama", CHANNEL)
    with torch.no_grad():
        gate.log_alpha.copy_(torch.linspace(-4, 4, 48))
    gate.started.fill_(True)
    random = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(5000):
        gate.redraw(random)
        draws.append(gate.drawn().detach().double())
    drawn_NU = torch.stack(draws)
    noise_N = (torch.arange(200000, dtype=torch.float64) + 0.5) / 200000
    for unit in (0, 13, 30, 47):
        alpha = float(gate.log_alpha[unit].detach())
        s_N = 1 / (1 + torch.exp(-(torch.log(noise_N / (1 - noise_N)) + alpha) / (2 / 3)))
        z_N = (s_N * 1.2 - 0.1).clamp(0, 1)
        for mine, own in (
            ((drawn_NU[:, unit] > 0), z_N > 0),
            ((drawn_NU[:, unit] == 1), z_N == 1),
            (drawn_NU[:, unit], z_N),
        ):
            # five standard errors of a mean of 5,000 numbers between 0 and 1
            assert abs(float(mine.double().mean() - own.double().mean())) < 5 * 0.5 / math.sqrt(5000)
    expected = [(1 / (1 + math.exp(-(one - 2 / 3 * math.log(0.1 / 1.1))))) for one in gate.log_alpha.detach().tolist()]
    assert float(gate.open_share().detach()) == pytest.approx(sum(expected) / 48, rel=1e-6)


@pytest.mark.parametrize(("name", "kind"), [("llama", KV_GROUP), ("llama", QUERY_HEAD), ("gpt2", CHANNEL),
                                            ("mixtral", EXPERT_CHANNEL)])  # fmt: skip
def test_a_gate_multiplies_what_its_unit_feeds(name: str, kind: str) -> None:
    gate, units, model = gate_of(name, kind)
    weight = model.get_parameter(units.writer.name).detach()
    assert torch.equal(gate.train()(weight), weight)  # before the start
    with torch.no_grad():
        gate.log_alpha.copy_(torch.linspace(-1.5, 2.5, units.count)[torch.randperm(units.count)])
    gate.eval().open.fill_(units.count - units.strata)
    factors, gone = gate.settled().detach(), gate.gone()
    assert len(gone) == units.strata and float(factors[gone].abs().max()) == 0
    assert sorted(one // units.size for one in gone) == list(range(units.strata))  # one of each stratum
    expected = weight.clone()
    for unit, columns in enumerate(units.columns_UN.tolist()):
        if units.stacked:
            expected[unit // units.size].select(units.writer.input_axis - 1, columns[0]).mul_(factors[unit])
        else:
            expected.index_copy_(units.writer.input_axis, torch.tensor(columns),
                                 weight.index_select(units.writer.input_axis, torch.tensor(columns)) * factors[unit])  # fmt: skip
    assert torch.equal(gate(weight), expected)
    gate.train().started.fill_(True)
    gate.redraw(torch.Generator().manual_seed(0))
    assert not torch.equal(gate(weight), expected)  # noise
    gate.choose()
    with torch.no_grad():
        gate.log_alpha.normal_()  # what moments still do to it
    assert torch.equal(gate(weight), expected) and float(gate.price().detach()) == 0 and gate.gone() == sorted(gone)


def test_the_price_drives_the_open_share_to_what_is_due() -> None:
    """Nothing but the price: descent on the gates and ascent on the multipliers stop where no more are open than are due."""
    gate, _, _ = gate_of("llama", CHANNEL)
    gate.score_U.copy_(torch.arange(48) % 7)
    gate.start()
    shut = torch.optim.AdamW([gate.log_alpha], lr=0.3, weight_decay=0.0)
    raise_price = torch.optim.AdamW([gate.multipliers], lr=0.3, weight_decay=0.0, maximize=True)
    assert float(gate.price().detach()) == 0  # all may be open
    gate.due.fill_(0.7)
    assert float(gate.open_share().detach()) > 0.95
    for _ in range(200):
        price = gate.price()
        excess = 48 * max(float(gate.open_share().detach()) - 0.7, 0.0)
        one, two = gate.multipliers.tolist()
        assert float(price.detach()) == pytest.approx(one * excess + two * excess**2, rel=1e-4, abs=1e-4)
        price.backward()
        for optimizer in (shut, raise_price):
            optimizer.step()
            optimizer.zero_grad()
    assert 0.6 < float(gate.open_share().detach()) <= 0.7 and min(gate.multipliers.tolist()) > 0
    gate.open.fill_(34)
    scores = gate.score_U[gate.gone()]  # the lowest: 14 of those with 0 and 1
    assert float(scores.max()) == 1 and int((scores == 0).sum()) == 7


@pytest.mark.parametrize(("name", "kind"), [("llama", KV_GROUP), ("gpt2", CHANNEL)])
def test_gates_are_scored_by_their_squared_gradients(name: str, kind: str) -> None:
    """Of each sequence, against autograd of a factor on each unit in float64; two steps, the first in two parts."""
    gate, units, model = gate_of(name, kind)
    weight = model.get_parameter(units.writer.name).detach()
    gate.train()

    def losses(x_NTI: torch.Tensor, weight: torch.Tensor, seed: int) -> torch.Tensor:
        y_NTO = x_NTI @ (weight.T if units.writer.input_axis == 1 else weight)
        noise_TO = torch.randn(y_NTO.shape[1:], generator=torch.Generator().manual_seed(seed))
        return (y_NTO * noise_TO).sum((1, 2))

    expected_U = torch.zeros(units.count, dtype=torch.float64)
    random = torch.Generator().manual_seed(0)
    for step, parts in ((0, 2), (1, 1)):
        x_NTI = torch.randn(4, 5, units.columns_UN.numel(), generator=random)
        for part in x_NTI.chunk(parts):
            losses(gate.watch(gate, (part,))[0], gate(weight), step).sum().backward()
        gate.score()
        for one in x_NTI.double():
            factor_U = torch.ones(units.count, dtype=torch.float64, requires_grad=True)
            losses(one[None], gate.times(weight.double(), factor_U), step).sum().backward()
            expected_U += factor_U.grad.square()
    # sums of float32 products
    assert torch.allclose(gate.score_U.double(), expected_U, rtol=1e-4)
    assert float(gate.log_alpha.grad.abs().max()) == 0
    gate.start()
    order = gate.log_alpha.detach().argsort()
    assert torch.equal(order, gate.score_U.argsort()) and float(gate.settled().detach().min()) > 0.999


@pytest.mark.parametrize("how", ["sheared", "compresso", "loraprune", "lorashear", "splora", "apt"])
def test_a_smaller_plain_model_comes_out(how: str, text: str, tmp_path: Path) -> None:
    settings = {"how": how, "ratio": 0.3, "ramp": 0.5, "data": text, **QUICK}
    result = llmprune.recover(DEMO, out=tmp_path / "out", **settings)
    entry, report = result.report["recovery"][-1], result.report
    dense, small = (AutoModelForCausalLM.from_pretrained(one) for one in (DEMO, tmp_path / "out"))
    layers = sum(one.numel() for one in dense.model.layers.parameters())
    gone = sum(one.numel() for one in dense.parameters()) - sum(one.numel() for one in small.parameters())
    assert gone >= 0.3 * layers and report["totals"]["params_after"] == sum(one.numel() for one in small.parameters())
    # the shape is that which a width method has for this amount
    width = llmprune.prune(DEMO, method="group-magnitude", ratio=0.3, out=tmp_path / "width").report
    assert report["totals"]["params_after"] == width["totals"]["params_after"]
    assert type(small) is type(AutoModelForCausalLM.from_pretrained(tmp_path / "width"))
    assert report["verified"].startswith("reloaded; logits equal")
    assert entry["best_step"] >= 3  # only then is the shape that of the end
    # cutting out what is shut changes nothing: float32 sums with and without zeros
    assert entry["held_out"]["stored"] == pytest.approx(entry["held_out"]["trained"], rel=1e-4)
    again = llmprune.recover(DEMO, out=tmp_path / "again", **settings)
    assert again.report["recovery"][-1]["best_step"] == entry["best_step"]
    assert product(tmp_path / "again")["model.safetensors"] == product(tmp_path / "out")["model.safetensors"]


@pytest.mark.parametrize("how", ["sheared", "loraprune", "lorashear", "splora"])
def test_experts_lose_channels_too(how: str, text: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    config = tiny.TINY["mixtral"].__class__(**{**tiny.TINY["mixtral"].to_dict(), "vocab_size": 512})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(tmp_path / "dense")
    llmprune.recover(tmp_path / "dense", how=how, ratio=0.3, data=text, out=tmp_path / "out", **QUICK)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert small.config.intermediate_size < config.intermediate_size


def test_what_cannot_be_sheared_is_refused(text: str, tmp_path: Path) -> None:
    for settings, says in (
        ({}, "ratio=0.25"),
        ({"ratio": 0.3, "ramp": 0.0}, "ramp=0.0"),
        ({"ratio": 0.3, "units": "layer"}, "unknown unit"),
        ({"ratio": 0.3, "training.shard": True}, "leave it off"),
    ):
        with pytest.raises(UserError, match=says):
            llmprune.recover(DEMO, how="sheared", data=text, out=tmp_path / "out", **QUICK, **settings)
    assert list(tmp_path.iterdir()) == []
