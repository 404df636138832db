"""How many units each layer loses."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import tiny
import torch

from llmprune.allocation.widths import LAYER, MOST, Demand, balanced, capped, influence, pooled, rising, uniform
from llmprune.arch.roles import Roles
from llmprune.arch.units import CHANNEL, KV_GROUP, Units, find_units
from llmprune.types import UserError

# How much goes where.


@cache
def units_of_qwen() -> list[Units]:
    return find_units(Roles(tiny.build("qwen3")), [KV_GROUP, CHANNEL])


def demand(parameters: int) -> Demand:
    return Demand({(one.layer, one.kind): one for one in units_of_qwen()}, parameters, heads=(1,), step=4)


def removed(ask: Demand, counts: dict) -> int:
    return sum(one.cost * counts[place] for place, one in ask.units.items())


def test_uniform_amounts_are_enough_and_not_a_step_more() -> None:
    whole = sum(one.cost * one.count for one in demand(1).units.values())
    for parameters in range(500, int(0.65 * whole), 371):
        ask = demand(parameters)
        counts = uniform(ask, {})
        step = sum(4 * one.cost for one in ask.units.values() if one.kind == CHANNEL)
        assert parameters <= removed(ask, counts)
        heads_alone = all(counts[place] == 0 for place in ask.units if place[1] == CHANNEL)
        assert heads_alone or removed(ask, counts) < parameters + step
        assert len({count for place, count in counts.items() if place[1] == CHANNEL}) == 1
    with pytest.raises(UserError, match="cannot go"):
        uniform(demand(whole), {})


def test_rising_amounts_rise() -> None:
    ask = demand(6000)
    counts = rising(ask, {})
    channels = [counts[(layer, CHANNEL)] for layer in range(3)]
    assert channels == sorted(channels) and channels[0] < channels[2]
    assert removed(ask, counts) >= 6000


def test_pooled_amounts_follow_the_true_cost() -> None:
    ask = demand(5000)
    scores = {place: torch.arange(one.count, dtype=torch.float64) for place, one in ask.units.items()}
    scores[(0, CHANNEL)] = torch.cat([torch.zeros(47, dtype=torch.float64), torch.full((1,), 1e6, dtype=torch.float64)])
    counts = pooled(ask, scores)
    # heads go one by one, channels by four
    most = max(one.cost * (4 if one.kind == CHANNEL else 1) for one in ask.units.values())
    assert 5000 <= removed(ask, counts) < 5000 + most
    assert all(counts[place] < one.count for place, one in ask.units.items())
    assert all((one.count - counts[place]) % 4 == 0 for place, one in ask.units.items() if one.kind == CHANNEL)
    assert 0 < counts[(1, CHANNEL)] < 48
    # standardised, its many zeros lie just below the mean: units of other layers go first
    assert counts[(0, CHANNEL)] < counts[(1, CHANNEL)]


def test_influence_spreads_by_the_best_of_all_shares_at_its_temperature() -> None:
    ask = replace(demand(4000), temperature=0.5)
    influences = [0.9, 0.2, 0.4]
    scores = {(layer, LAYER): torch.tensor(one, dtype=torch.float64) for layer, one in enumerate(influences)}
    share_L = capped(
        torch.softmax(-torch.tensor(influences, dtype=torch.float64) / 0.5, 0), torch.ones(3, dtype=torch.float64), 0.9
    )
    assert float(share_L.sum()) == pytest.approx(0.9) and float(share_L.max()) < MOST

    def objective(share_L: torch.Tensor) -> float:
        """What stays influences so much, and the entropy of what goes."""
        part_L = share_L / 0.9
        return -float(
            (torch.tensor(influences, dtype=torch.float64) * part_L).sum() + 0.5 * (part_L * part_L.log()).sum()
        )

    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        other_L = torch.rand(3, generator=generator, dtype=torch.float64)
        assert objective(0.9 * other_L / other_L.sum()) <= objective(share_L)
    counts = influence(ask, scores)
    channels = [counts[(layer, CHANNEL)] for layer in range(3)]
    assert removed(ask, counts) >= 4000 and channels[0] < channels[2] < channels[1]
    # a temperature near zero would take all from one layer: it keeps a tenth, and the next one gives the rest
    cold_L = capped(torch.tensor([0.0, 1.0, 1e-9], dtype=torch.float64), torch.ones(3, dtype=torch.float64), 1.5)
    assert cold_L.tolist() == pytest.approx([0.0, MOST, 1.5 - MOST])


def test_balanced_takes_the_heads_that_cost_least() -> None:
    ask = demand(4000)
    cheap = {place: torch.ones(one.count, dtype=torch.float64) for place, one in ask.units.items()}
    dear = {place: one * (1e-3 if place[1] == CHANNEL else 1.0) for place, one in cheap.items()}
    assert balanced(ask, dear)[(0, KV_GROUP)] == 0
    free = {place: one * (1e-3 if place[1] == KV_GROUP else 1.0) for place, one in cheap.items()}
    assert balanced(ask, free)[(0, KV_GROUP)] == 1
