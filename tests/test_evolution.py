"""The search for how much every layer loses: its moves, the levels it puts together, and how it measures them."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from families import MORE
from torch.nn import functional as F

import llmprune
from llmprune.allocation.evolution import Counts, Evolution
from llmprune.allocation.widths import Demand, uniform
from llmprune.arch.discover import find_units as find_layers
from llmprune.arch.roles import Roles
from llmprune.arch.units import CHANNEL, KV_GROUP, find_units
from llmprune.engine.trunk import Trunk
from llmprune.methods.structural import Narrow
from llmprune.methods.width.levels import Divergence, Levels, leading
from llmprune.methods.width.obs import GroupOBS
from llmprune.types import UserError
from llmprune.weights import Resident

TEXT = [row.tolist() for row in tiny.tokens(8, 20, seed=3)]


def demand_of(model: Any, parameters: int, step: int = 4) -> Demand:
    units = {(one.layer, one.kind): one for one in find_units(Roles(model), [KV_GROUP, CHANNEL])}
    return Demand(units, parameters, heads=(1, 2, 3), step=step)


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Three layers of four kv groups and 48 channels."""
    monkeypatch.setitem(tiny.TINY, "llama", MORE["llama"])
    return tiny.build("llama").requires_grad_(False)


def test_the_search_finds_the_best_and_keeps_the_amount(llama: Any) -> None:
    evolution = Evolution(demand_of(llama, 6000), generations=40, offspring=12, seed=1)
    units = evolution.demand.units
    start = evolution.start(uniform(evolution.demand, {}))
    levels = evolution.levels(start)
    removed = sum(one.cost * start[place] for place, one in units.items())
    weight = {place: 1.0 + 3 * number for number, place in enumerate(units)}

    def badness(counts: Counts) -> float:
        return sum(weight[place] * (count / units[place].count) ** 2 for place, count in counts.items())

    def measure(candidates: Any, stage: int) -> list[float]:
        for one in candidates:
            assert sum(units[place].cost * count for place, count in one.items()) == removed
            assert all(count in levels[place] for place, count in one.items())
        # the earlier stages see less
        return [badness(one) * (1 + 0.02 * (2 - stage)) for one in candidates]

    best, history = evolution.search(start, measure)
    assert history[0] == badness(start) and history == sorted(history, reverse=True)
    kinds = {kind: [place for place in units if place[1] == kind] for kind in (KV_GROUP, CHANNEL)}
    least = sum(
        min(
            badness(dict(zip(places, counts, strict=True)))
            for counts in itertools.product(*(levels[place] for place in places))
            if sum(counts) == sum(start[place] for place in places)
        )
        for places in kinds.values()
    )
    assert badness(best) == pytest.approx(least, rel=1e-12)
    assert evolution.search(start, measure)[0] == best


@pytest.mark.parametrize("parameters", [3000, 5000, 7000, 9001])
def test_the_start_goes_beyond_the_demand_by_less_than_a_step_of_one_layer(llama: Any, parameters: int) -> None:
    demand = demand_of(llama, parameters)
    start = Evolution(demand, 1, 1, 0).start(uniform(demand, {}))
    removed = sum(one.cost * start[place] for place, one in demand.units.items())
    assert parameters <= removed
    some_channels_go = any(start[place] for place in start if place[1] == CHANNEL)
    assert removed < parameters + 4 * demand.units[(0, CHANNEL)].cost or not some_channels_go


def test_leading_units_of_an_order() -> None:
    assert leading([3, 0, 1, 5, 4, 2], 4, 2, 6) == [3, 0, 1, 5]
    assert leading([3, 4, 5, 0, 1], 4, 2, 6) == [3, 4, 0, 1]
    assert leading([3, 4, 5], 2, 1, 6) == [3, 4]


def test_levels_are_least_squares_and_their_divergence_that_of_the_whole_model(llama: Any) -> None:
    demand = demand_of(llama, 6000)
    start = uniform(demand, {})
    levels_of = Evolution(demand, 1, 1, 0).levels(start)
    asked = Narrow(Roles(llama), dict(demand.units), lambda _: start, False, lambda _: None)
    batches = [{"input_ids": torch.tensor(TEXT[:4])}, {"input_ids": torch.tensor(TEXT[4:])}]
    trunk = Trunk(llama, find_layers(llama, head=False), batches, Resident(llama))
    damping = 0.01
    levels = Levels(trunk, asked, GroupOBS(damping=damping).way(), start, levels_of)
    # the inputs of the first o_proj are the dense ones
    seen: list[torch.Tensor] = []
    hook = llama.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    dense = llama(input_ids=torch.tensor(TEXT), use_cache=False).logits.double()
    hook.remove()
    x_TI = seen[0].flatten(0, 1).double()
    weight_OI = llama.model.layers[0].self_attn.o_proj.weight.double()
    for count in levels_of[(0, KV_GROUP)]:
        prefix = "model.layers.0."
        found_OI = levels.values(0, prefix, {(0, KV_GROUP): count})["self_attn.o_proj.weight"].double()
        kept_I = found_OI.abs().sum(0) > 0
        assert int(kept_I.sum()) == (4 - count) * 8
        # rows of sqrt(damping) beside the inputs are the ridge; what the columns that stay should put out is X W'
        ridge_II = (damping * x_TI.square().sum(0).mean()).sqrt() * torch.eye(x_TI.shape[1], dtype=torch.float64)
        system_TI = torch.cat([x_TI, ridge_II])
        best_KO = torch.linalg.lstsq(system_TI[:, kept_I], system_TI @ weight_OI.T).solution
        assert float((found_OI[:, kept_I].T - best_KO).abs().max()) <= 1e-5
    counts = {place: levels_of[place][-1 if place[0] == 1 else 0] for place in levels_of}
    pruned = copy.deepcopy(llama)
    for index in range(3):
        for name, value in levels.values(index, f"model.layers.{index}.", counts).items():
            pruned.model.layers[index].get_parameter(name).copy_(value)
    other = pruned(input_ids=torch.tensor(TEXT), use_cache=False).logits.double()
    found = Divergence(trunk, levels)([counts, dict.fromkeys(start, 0)], 2)
    wanted = F.log_softmax(dense, -1)
    expected = (wanted.exp() * (wanted - F.log_softmax(other, -1))).sum(-1).mean()
    assert found[0] == pytest.approx(float(expected), rel=1e-4)
    assert abs(found[1]) <= 1e-6


def test_a_searched_model_has_exactly_the_parameters_that_were_asked_for(tmp_path: Path, llama: Any) -> None:
    source = tiny.save("llama", tmp_path / "dense")
    settings: dict[str, Any] = {
        "params": 24_000,
        "allocation": "evolutionary",
        "layout": "remote-code",
        "calibration": TEXT,
        "width": {"generations": 3, "offspring": 6, "round_to": 2},
    }
    report = llmprune.prune(source, out=tmp_path / "out", **settings).report
    assert report["stages"][1]["recipe"]["method"] == "group-obs" and report["verified"].startswith(
        "reloaded; logits equal"
    )
    # a step is two channels of one layer
    assert 24_000 - 2 * 96 < report["totals"]["params_after"] <= 24_000 and report["totals"]["zeros"] == 0
    history = report["structure"]["notes"]["search"]["kl"]
    assert len(history) == 4 and history == sorted(history, reverse=True)
    again = llmprune.prune(source, out=tmp_path / "again", **settings)
    files = ((folder / "model.safetensors").read_bytes() for folder in (tmp_path / "out", tmp_path / "again"))
    assert len(set(files)) == 1 and again.report["structure"]["widths"] == report["structure"]["widths"]
    with pytest.raises(UserError, match="levels of group-obs"):
        llmprune.prune(tiny.build("llama"), method="wanda-sp", **settings)
