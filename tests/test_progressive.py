"""Units of width that go while adapters train: what is noted, who goes, what grows, and what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmprune
from llmprune import UserError
from llmprune.checkpoint.slicing import Slicing
from llmprune.recovery import make_kind
from llmprune.recovery.apt import Apt, Growing, kurtosis
from llmprune.recovery.progressive import Progressive
from llmprune.recovery.zeros import find_targets

pytest.importorskip("accelerate")
pytest.importorskip("peft")

DEMO = Path(llmprune.__file__).parent / "demo" / "model"


def prepared(how: str, layout: str, **options: Any) -> tuple[Progressive, Any, list[Any]]:
    """A tiny model with adapters that are no longer zero."""
    model = tiny.build(layout)
    targets = find_targets(model)
    kind: Progressive = make_kind(how, {"ratio": 0.3, "rank": 2, "ramp": 0.5, **options}, seed=0)
    kind.check(targets)
    kind.prepare(model, targets)
    torch.manual_seed(1)
    with torch.no_grad():
        for one in kind.adapters:
            one.b.normal_(std=0.1)
    return kind, model, targets


def backward(model: Any) -> torch.Tensor:
    loss = model(input_ids=tiny.tokens(2, 12), use_cache=False).logits.float().logsumexp(-1).mean()
    loss.backward()
    return loss.detach()


def test_kurtosis_of_all_products() -> None:
    """Of w_i x_t over all i and t, from the moments of each alone; against all products, in float64."""
    random = torch.Generator().manual_seed(0)
    w_OI = torch.randn(7, 5, generator=random, dtype=torch.float64) + 0.3
    x_TI = torch.randn(11, 5, generator=random, dtype=torch.float64) ** 3 + 0.1
    raw_4I = torch.stack([(w_OI**n).mean(0) * (x_TI**n).mean(0) for n in range(1, 5)])
    every_NI = (w_OI[:, None] * x_TI).flatten(0, 1)
    central_NI = every_NI - every_NI.mean(0)
    expected_I = (central_NI**4).mean(0) / (central_NI**2).mean(0) ** 2
    assert torch.allclose(kurtosis(raw_4I), expected_I, rtol=1e-10)
    assert kurtosis(torch.zeros(4, 2)).tolist() == [1, 1]


@pytest.mark.parametrize("layout", ["llama", "gpt2", "phi3"])
def test_salience_is_activations_times_gradients_and_outliers(layout: str) -> None:
    kind, model, targets = prepared("apt", layout)
    by_name = {target.name: target for target in targets}
    inputs: dict[str, torch.Tensor] = {}
    places = {kind.units_of(place).writer.name: place for place in kind.masks}
    for name in places:

        def keep(module: Any, args: Any, name: str = name) -> None:
            args[0].retain_grad()
            inputs[name] = args[0]

        by_name[name].owner.register_forward_pre_hook(keep)
    backward(model)
    for name, place in places.items():
        x_TI, units = inputs[name].detach().double().flatten(0, 1), kind.units_of(place)
        gradient_TI = inputs[name].grad.double().flatten(0, 1)
        weight = by_name[name].owner.parametrizations[by_name[name].short].original.detach().double()
        weight_OI = weight if units.writer.output_axis == 0 else weight.T
        product_I = gradient_TI.abs().sum(0) * x_TI.abs().sum(0)
        every_NI = (weight_OI[:, None] * x_TI).flatten(0, 1)
        central_NI = every_NI - every_NI.mean(0)
        tails_I = ((central_NI**4).mean(0) / (central_NI**2).mean(0) ** 2).sqrt()
        product_U, tails_U = (one[units.columns_UN].sum(1) for one in (product_I, tails_I))
        expected_U = product_U / product_U.mean() + tails_U / tails_U.mean()
        # sums of float32 numbers, up to their fourth power
        assert torch.allclose(kind.masks[place].taken().double(), expected_U, rtol=1e-4)
        assert float(kind.masks[place].sums_7I.abs().max()) == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("layout", ["llama", "gpt2", "phi3", "mixtral"])
def test_slopes_are_derivatives_by_the_factors(layout: str) -> None:
    """Against autograd's, with the factors as leaves; two backward passes add up."""
    kind, model, _ = prepared("splora", layout)
    for mask in kind.masks.values():
        mask.factor.requires_grad_()
    for _ in range(2):
        backward(model)
    for mask in kind.masks.values():
        assert mask.factor.grad is not None
        expected = mask.factor.grad.abs()
        # sums of float32 numbers
        assert torch.allclose(mask.taken(), expected, rtol=1e-3, atol=1e-5 * float(expected.max()))
        assert float(mask.taken().abs().max()) == 0


@pytest.mark.parametrize("how", ["splora", "apt"])
def test_units_go_bit_by_bit_and_the_lowest_ones(how: str) -> None:
    kind, model, _ = prepared(how, "llama")
    steps, due, gone = 20, dict(kind._due), []
    for done in range(1, steps + 1):
        backward(model)
        kind.after_step(done, steps)
        gone.append({place: len(mask.gone()) for place, mask in kind.masks.items()})
        for mask in kind.masks.values():
            assert (
                sorted(mask.gone()) == sorted(mask.score.argsort(stable=True)[: len(mask.gone())].tolist()) or done > 8
            )
        assert kind.settled(done, steps) == (done >= 10)
    for place, mask in kind.masks.items():
        counts = [one[place] for one in gone]
        assert counts == sorted(counts) and counts[7:] == [due[place]] * 13  # chosen over 8 of 10 steps
        assert mask.factor.tolist() == [float(one) for one in mask.kept]
    channel = next(place for place in due if place[1] == "channel")
    # rising as 1 - (1 - t)^3
    assert [one[channel] for one in gone[:8]] == [int((1 - (1 - t / 8) ** 3) * due[channel]) for t in range(1, 9)]


def test_factors_fall_by_steps() -> None:
    kind, model, _ = prepared("splora", "llama", ramp=1.0)
    seen = set()
    for done in range(1, 21):
        backward(model)
        kind.after_step(done, 20)
        seen |= {round(float(one), 3) for mask in kind.masks.values() for one in mask.factor}
    assert seen == {0.0, 0.25, 0.5, 0.75, 1.0}  # over the last fifth of the ramp


@pytest.mark.parametrize("layout", ["llama", "gpt2", "phi3", "mixtral"])
def test_merging_and_pruning_may_change_places(layout: str) -> None:
    """The adapter cut with its base and then merged is the merged one cut; what goes gets no gradient at the end."""
    kind, model, targets = prepared("splora", layout)
    for done in range(1, 5):
        model.zero_grad()
        backward(model)
        kind.after_step(done, 4)
    model.zero_grad()
    backward(model)
    plan, removed = kind._plan, kind.removed()
    slicing = Slicing(plan.asked.units.values(), plan.shapes, removed)
    by_name = {target.name: target for target in targets}
    names = [one.name for one in targets if one.place is not None]
    checked = 0
    parts = {}
    for name, adapter in zip(names, kind.adapters, strict=True):
        original = by_name[name].owner.parametrizations[by_name[name].short].original.detach().clone()
        parts[name] = (original, adapter.a.detach().clone(), adapter.b.detach().clone(), adapter)
    kind.merge(targets)
    for name, (original, a, b, adapter) in parts.items():
        if original.dim() > 2:
            continue  # of experts, each has rows and columns of its own
        rows, columns = (slicing.kept_along(name, axis) for axis in (0, 1))
        merged = slicing.cut(name, model.get_parameter(name).detach())
        cut = slicing.cut(name, original) + adapter.scale * b[rows] @ a[:, columns]
        # one rounding of a sum of two ranks
        assert torch.allclose(merged, cut, rtol=1e-5, atol=1e-6)
        gone_rows = sorted(set(range(len(b))) - set(rows))
        gone_columns = sorted(set(range(a.shape[1])) - set(columns))
        assert float(adapter.b.grad[gone_rows].abs().sum()) == 0
        assert float(adapter.a.grad[:, gone_columns].abs().sum()) == 0
        assert float(adapter.b.grad.abs().sum()) > 0
        checked += bool(gone_rows or gone_columns)
    assert checked >= 3


def test_adapters_that_matter_grow() -> None:
    kind, model, _ = prepared("apt", "llama", rank=4, growth=2.0)
    assert isinstance(kind, Apt)
    adapters: list[Growing] = kind.adapters  # type: ignore[assignment]
    assert {(int(one.active), one.b.shape[-1]) for one in adapters} == {(4, 8)}
    with torch.no_grad():
        for one in adapters:
            one.b[..., 4:] = 0
    ids = tiny.tokens(2, 12)
    for done in range(1, 11):
        before = model(input_ids=ids, use_cache=False).logits.detach()
        model.zero_grad()
        backward(model)
        assert all(float(one.b.grad[..., int(one.active) :].abs().sum()) == 0 for one in adapters)
        slopes = [float((one.b.detach() * one.b.grad).flatten(0, -2).sum(0).abs().sum()) for one in adapters]
        ranks = [int(one.active) for one in adapters]
        kind._tune(done, 10)
        # a moving average of the same numbers
        weights = [(1 - 0.85**done) * one for one in slopes]
        assert [float(one.importance) for one in adapters] == pytest.approx(weights, rel=1e-4)
        grown = {number for number, one in enumerate(adapters) if int(one.active) > ranks[number]}
        half = set(sorted(range(len(adapters)), key=lambda number: -slopes[number])[: len(adapters) // 2])
        assert grown == (half if done in (3, 5, 8) else set())  # 4, 5, 6, 8, and no room is left at 10
        # new ranks start at nothing
        assert torch.equal(model(input_ids=ids, use_cache=False).logits.detach(), before)
    assert sorted({int(one.active) for one in adapters}) == [4, 8]


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    quick = {"out": tmp_path / "out", "seqlen": 32, "steps": 2, "batch_size": 4}
    for how, settings, says in (
        ("apt", {}, "ratio=0.25"),
        ("apt", {"ratio": 2}, "ratio=2 must lie between"),
        ("splora", {"ratio": 0.3, "ramp": 1.5}, "ramp=1.5"),
        ("apt", {"ratio": 0.3, "growth": 0.5}, "growth=0.5"),
        ("apt", {"ratio": 0.3, "units": "layer"}, "unknown unit"),
        ("splora", {"ratio": 0.3, "units": "residual"}, "units=residual: they are not the inputs of one matrix"),
        ("splora", {"ratio": 0.3, "targets": "mlp"}, "no option 'targets'"),
        ("splora", {"ratio": 0.3, "adapter": str(tmp_path / "adapter")}, "no adapter in PEFT's format"),
        ("splora", {"ratio": 0.3, "training.shard": True}, "leave it off"),
    ):
        with pytest.raises(UserError, match=says):
            llmprune.recover(DEMO, how=how, **quick, **settings)
    experts = tmp_path / "experts"
    config = tiny.TINY["mixtral"].__class__(**{**tiny.TINY["mixtral"].to_dict(), "vocab_size": 512})
    AutoModelForCausalLM.from_config(config).save_pretrained(experts)
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(experts)
    with pytest.raises(UserError, match="units=kv-group"):
        llmprune.recover(experts, how="apt", ratio=0.3, **quick)
    assert [one.name for one in tmp_path.iterdir()] == ["experts"]
