"""What columns taken out in groups cost, and what the others make up for; scores against their definitions."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from functools import cache

import pytest
import tiny
import torch
from torch import nn
from transformers import PreTrainedModel

from llmprune.allocation.widths import LAYER, MOST, Demand, balanced, capped, influence, pooled, rising, uniform
from llmprune.arch.discover import find_units as layers_of
from llmprune.arch.roles import Roles
from llmprune.arch.units import CHANNEL, EXPERT_CHANNEL, KV_GROUP, RESIDUAL, Units, find_units
from llmprune.checkpoint.skeleton import run_experts_one_by_one
from llmprune.checkpoint.slicing import HIDDEN
from llmprune.engine.gates import gated
from llmprune.engine.gradients import squared_gates
from llmprune.engine.trunk import Trunk
from llmprune.methods.structural import Narrow
from llmprune.methods.width.choice import lowest
from llmprune.methods.width.group_fisher import GroupFisher
from llmprune.methods.width.k_prune import KPrune
from llmprune.methods.width.llm_pruner import LLMPruner
from llmprune.methods.width.magnitude import GroupMagnitude
from llmprune.methods.width.minitron import Minitron
from llmprune.methods.width.thinet import ThiNet
from llmprune.solvers.groups import damped, eliminate, fold, joint_energy, mean_fold, own_energy, unlike
from llmprune.types import UserError
from llmprune.weights import Resident

DOUBLE = torch.float64


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights 7 x 12 and 60 correlated inputs with a mean."""
    x_TI = draw(60, 12, seed=seed) @ (torch.eye(12, dtype=DOUBLE) + 0.3 * draw(12, 12, seed=seed + 1)) + 0.5
    return draw(7, 12, seed=seed + 2), x_TI


def error(x_TI: torch.Tensor, change_OI: torch.Tensor) -> float:
    return float((x_TI @ change_OI.T).square().sum())


def mask(gone: list[int], columns_UN: torch.Tensor) -> torch.Tensor:
    found = torch.zeros(12, dtype=torch.bool)
    found[columns_UN[gone].flatten()] = True
    return found


@pytest.mark.parametrize("width", [1, 3])
def test_obs_ends_in_the_fold_and_its_scores_sum_to_the_error(width: int) -> None:
    weight_OI, x_TI = problem()
    columns_UN = torch.arange(12).view(-1, width)
    count = len(columns_UN) // 2
    trace = eliminate(weight_OI, x_TI.T @ x_TI, columns_UN, count)
    folded_OI = fold(weight_OI, x_TI.T @ x_TI, mask(trace.order, columns_UN))
    assert len(set(trace.order)) == count
    loss = error(x_TI, folded_OI - weight_OI)
    assert sum(trace.losses) == pytest.approx(loss, rel=1e-10)
    # one run holds every smaller amount
    shorter = eliminate(weight_OI, x_TI.T @ x_TI, columns_UN, count - 1)
    assert shorter.order == trace.order[:-1] and shorter.losses == pytest.approx(trace.losses[:-1], rel=1e-12)


def test_the_fold_is_least_squares_and_nystroem() -> None:
    weight_OI, x_TI = problem()
    gone_I = torch.zeros(12, dtype=torch.bool)
    gone_I[[1, 4, 5, 9]] = True
    kept_I = ~gone_I
    folded_OI = fold(weight_OI, x_TI.T @ x_TI, gone_I)
    best_KO = torch.linalg.lstsq(x_TI[:, kept_I], x_TI @ weight_OI.T).solution
    gram_II = x_TI.T @ x_TI
    nystroem_KI = torch.linalg.inv(gram_II[kept_I][:, kept_I]) @ gram_II[kept_I]
    assert not folded_OI[:, gone_I].any()
    for other_OK in (best_KO.T, weight_OI @ nystroem_KI.T):
        assert float((folded_OI[:, kept_I] - other_OK).abs().max()) <= 1e-12 * float(folded_OI.abs().max()) * 100


def test_one_step_of_obs_is_the_best_of_all() -> None:
    weight_OI, x_TI = problem()
    for width in (1, 3):
        columns_UN = torch.arange(12).view(-1, width)
        losses = [
            error(x_TI, fold(weight_OI, x_TI.T @ x_TI, mask([unit], columns_UN)) - weight_OI)
            for unit in range(len(columns_UN))
        ]
        trace = eliminate(weight_OI, x_TI.T @ x_TI, columns_UN, 1)
        assert trace.order == [losses.index(min(losses))]
        assert trace.losses[0] == pytest.approx(min(losses), rel=1e-10)


def test_strata_lose_equally_many() -> None:
    weight_OI, x_TI = problem()
    trace = eliminate(weight_OI * torch.arange(1, 13), x_TI.T @ x_TI, torch.arange(12)[:, None], 6, strata=3)
    assert [sum(unit // 4 == run for unit in trace.order) for run in range(3)] == [2, 2, 2]
    assert lowest(torch.tensor([3.0, 1, 2, 0, 5, 4]), 2, strata=2) == [1, 3]


def test_the_mean_fold_never_loses_to_zeros() -> None:
    weight_OI, x_TI = problem()
    gone_I = mask([2, 3, 7], torch.arange(12)[:, None])
    bias_O = mean_fold(weight_OI, x_TI.mean(0), gone_I)
    missing_TO = x_TI[:, gone_I] @ weight_OI[:, gone_I].T
    with_bias = float((missing_TO - bias_O).square().sum())
    assert float(bias_O.sub(missing_TO.mean(0)).abs().max()) <= 1e-13
    assert with_bias < float(missing_TO.square().sum())
    assert error(x_TI, fold(weight_OI, x_TI.T @ x_TI, gone_I) - weight_OI) < float(missing_TO.square().sum())


def test_dead_inputs_do_no_harm() -> None:
    weight_OI, x_TI = problem()
    x_TI[:, 3] = 0
    system_II = damped(x_TI.T @ x_TI, 0.0)
    trace = eliminate(weight_OI, system_II, torch.arange(12)[:, None], 2)
    folded_OI = fold(weight_OI, system_II, mask([3], torch.arange(12)[:, None]))
    assert bool(torch.isfinite(folded_OI).all()) and len(trace.order) == 2
    assert error(x_TI, folded_OI - weight_OI) <= 1e-20


def test_joint_energy_is_that_of_the_set() -> None:
    weight_OI, x_TI = problem()
    columns_UN = torch.arange(12).view(4, 3)
    energy_UU = joint_energy(weight_OI, x_TI.T @ x_TI, columns_UN)
    for pair in itertools.combinations(range(4), 2):
        gone_I = mask(list(pair), columns_UN)
        expected = error(x_TI[:, gone_I], weight_OI[:, gone_I])
        assert float(energy_UU[list(pair)][:, list(pair)].sum()) == pytest.approx(expected, rel=1e-12)


def test_copies_are_like_and_orthogonal_units_are_not() -> None:
    x_TI = torch.linalg.qr(draw(40, 12, seed=1)).Q * torch.arange(1, 13)
    columns_UN = torch.arange(12).view(4, 3)
    assert float((unlike(x_TI.T @ x_TI, columns_UN) - 1).abs().max()) <= 1e-12
    x_TI[:, 3:6] = -2 * x_TI[:, 0:3]
    assert unlike(x_TI.T @ x_TI, columns_UN).tolist() == pytest.approx([0, 0, 1, 1], abs=1e-12)
    _, mixed_TI = problem()
    cosine_II = (mixed_TI / mixed_TI.norm(dim=0)).T @ (mixed_TI / mixed_TI.norm(dim=0))
    expected = 1 - (cosine_II.abs() - torch.eye(12)).amax(1)
    found = unlike(mixed_TI.T @ mixed_TI, torch.arange(12)[:, None])
    assert float((found - expected).abs().max()) <= 1e-12


# Scores of whole models.


def setting(model: PreTrainedModel, rows: int = 4) -> tuple[Trunk, Narrow]:
    model.requires_grad_(False)
    batches = [{"input_ids": tiny.tokens(rows, 10, seed=3)}]
    roles = Roles(model)
    units = {(one.layer, one.kind): one for one in find_units(roles, [KV_GROUP, CHANNEL])}
    asked = Narrow(roles, units, lambda _: dict.fromkeys(units, 0), False, lambda _: None)
    return Trunk(model, layers_of(model, head=False), batches, Resident(model)), asked


def mean_loss(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits.double()
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def own_gradients(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.requires_grad_(True)
    model.zero_grad()
    mean_loss(model, ids).backward()
    found = {name: one.grad.double() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    model.requires_grad_(False)
    return found


@pytest.mark.parametrize("taylor", ["vector", "first", "second", "mixed"])
def test_taylor_scores_are_those_of_the_right_heads(taylor: str) -> None:
    model = tiny.build("llama")
    trunk, asked = setting(model)
    ids = trunk.batches[0]["input_ids"]
    found = LLMPruner(taylor=taylor).scores(trunk, asked)
    gradients = own_gradients(model, ids)
    each = [own_gradients(model, ids[row : row + 1]) for row in range(len(ids))]
    squares = {name: torch.stack([one[name].square() for one in each]).mean(0) for name in gradients}

    def score(name: str, rows: torch.Tensor, axis: int) -> float:
        """By the definition, one slice after another."""
        total = 0.0
        for row in rows.tolist():
            w, g, h = (
                one.movedim(axis, 0)[row].double()
                for one in (model.get_parameter(name).detach(), gradients[name], squares[name])
            )
            total += {
                "vector": float((w * g).sum().abs()),
                "first": float((w * g).abs().sum()),
                "second": float((w * w * h).sum()),
                "mixed": float((w * g - w * w * h / 2).abs().sum()),
            }[taylor]
        return total

    base = "model.layers.1."
    # four query heads of width 8 in two groups: group 1 is query heads 2 and 3
    queries, keys = torch.arange(16, 32), torch.arange(8, 16)
    group = score(f"{base}self_attn.q_proj.weight", queries, 0) + score(f"{base}self_attn.o_proj.weight", queries, 1)
    group += sum(score(f"{base}self_attn.{one}_proj.weight", keys, 0) for one in "kv")
    assert float(found[(1, KV_GROUP)][1]) == pytest.approx(group, rel=1e-4)
    channel = sum(score(f"{base}mlp.{one}_proj.weight", torch.tensor([7]), 0) for one in ("gate", "up"))
    channel += score(f"{base}mlp.down_proj.weight", torch.tensor([7]), 1)
    assert float(found[(1, CHANNEL)][7]) == pytest.approx(channel, rel=1e-4)


def with_hidden(model: PreTrainedModel) -> tuple[Trunk, Narrow]:
    trunk, asked = setting(model)
    return trunk, replace(asked, units={HIDDEN: find_units(asked.roles, [RESIDUAL])[0]})


def slice_of(name: str, one: torch.Tensor) -> torch.Tensor:
    """A parameter, hidden dimensions first: what writes to the hidden state has them as outputs, all else as inputs."""
    axis = -2 if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")) else -1
    return one.detach().double().movedim(axis, 0).reshape(32, -1)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("taylor", ["vector", "first", "second", "mixed"])
def test_taylor_scores_of_the_hidden_state_take_in_every_parameter(
    taylor: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = copy.deepcopy(tiny.TINY["llama"])
    config.tie_word_embeddings = tied
    monkeypatch.setitem(tiny.TINY, "llama", config)
    model = tiny.build("llama")
    trunk, asked = with_hidden(model)
    ids = trunk.batches[0]["input_ids"]
    found_D = LLMPruner(taylor=taylor).scores(trunk, asked)[HIDDEN]
    gradients = own_gradients(model, ids)
    each = [own_gradients(model, ids[row : row + 1]) for row in range(len(ids))]
    expected_D = torch.zeros(32, dtype=DOUBLE)
    assert ("lm_head.weight" in gradients) != tied
    for name in gradients:
        w_DK = slice_of(name, model.get_parameter(name))
        g_DK = slice_of(name, gradients[name])
        h_DK = torch.stack([slice_of(name, one[name]).square() for one in each]).mean(0)
        expected_D += {
            "vector": (w_DK * g_DK).sum(1).abs(),
            "first": (w_DK * g_DK).abs().sum(1),
            "second": (w_DK.square() * h_DK).sum(1),
            "mixed": (w_DK * g_DK - w_DK.square() * h_DK / 2).abs().sum(1),
        }[taylor]
    assert float((found_D / expected_D - 1).abs().max()) <= 1e-4


def test_magnitude_and_activity_of_the_hidden_state() -> None:
    model = tiny.build("qwen3-moe")  # norms of heads, dense and expert layers, routers
    trunk, asked = with_hidden(model)
    expected_D = torch.zeros(32, dtype=DOUBLE)
    for name, one in model.named_parameters():
        if not name.endswith(("q_norm.weight", "k_norm.weight")):
            expected_D += slice_of(name, one).abs().sum(1)
    found_D = GroupMagnitude(norm=1).hidden(trunk, asked)
    assert float((found_D / expected_D - 1).abs().max()) <= 1e-5
    seen: list[torch.Tensor] = []
    for name, module in model.named_modules():
        if name.endswith("layernorm"):
            module.register_forward_hook(lambda _, args, out: seen.append(out.detach().flatten(0, 1).double()))
    model(**trunk.batches[0], use_cache=False)
    expected_D = torch.stack([one.square().mean(0).sqrt() for one in seen]).sum(0)
    assert len(seen) == 6
    assert float((Minitron().hidden(trunk, asked) / expected_D - 1).abs().max()) <= 1e-5


def test_fisher_scores_are_squared_gradients_of_gates() -> None:
    model = tiny.build("llama")
    trunk, asked = setting(model)
    ids = trunk.batches[0]["input_ids"]
    found = GroupFisher().scores(trunk, asked)
    down = model.get_parameter("model.layers.2.mlp.down_proj.weight")
    expected = 0.0
    for row in range(len(ids)):
        # the gate on an input is a factor on its column: dL/dm = w . dL/dw
        gradient = own_gradients(model, ids[row : row + 1])["model.layers.2.mlp.down_proj.weight"]
        expected += float((gradient[:, 5] * down.detach()[:, 5].double()).sum()) ** 2
    assert float(found[(2, CHANNEL)][5]) == pytest.approx(expected, rel=1e-4)


def test_the_likelihood_of_drawn_tokens_bends_as_the_divergence_does() -> None:
    """E (dL/dm)², over labels that the model draws, is the second derivative of KL(model, gated model) at m = 1."""
    model = tiny.build("gpt2").double()  # whose norms do not round to float32
    ids = tiny.tokens(1, 8, seed=4)
    generator = torch.Generator().manual_seed(0)
    rounds, rows = 6, 250
    with torch.no_grad():
        roles = Roles(model)
        units = {(one.layer, one.kind): one for one in find_units(roles, [CHANNEL])}
        trunk = Trunk(
            model, layers_of(model, head=False), [{"input_ids": ids.expand(rows, -1)}] * rounds, Resident(model)
        )

        def drawn(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            labels = torch.multinomial(logits[:, :-1].softmax(-1).flatten(0, 1), 1, generator=generator)
            return torch.cat([ids[:, :1], labels.view(len(ids), -1)], 1)

        found = squared_gates(trunk, units.values(), drawn)
        before = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        step, place = 1e-3, (1, CHANNEL)
        for channel in (3, 20):
            gates = {key: torch.ones(one.count, dtype=DOUBLE) for key, one in units.items()}
            gates[place][channel] += step
            with gated(model, units.values(), gates):
                after = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            curvature = 2 * float((before.exp() * (before - after)).sum()) / step**2
            estimate = float(found[place][channel]) / (rounds * rows) * (ids.shape[1] - 1) ** 2
            # a mean of 1500 squares of sums, each about chi-squared of one degree: standard error sqrt(2 / 1500) of it
            assert abs(estimate - curvature) <= 4 * (2 / 1500) ** 0.5 * curvature


def test_own_energy_is_the_energy_of_what_a_unit_puts_out() -> None:
    weight_OI, x_TI = problem()
    columns_UN = torch.arange(12).view(4, 3)
    expected_U = [error(x_TI[:, one], weight_OI[:, one]) for one in columns_UN]
    found_U = own_energy(weight_OI, x_TI.T @ x_TI, columns_UN)
    assert found_U.tolist() == pytest.approx(expected_U, rel=1e-12)


def test_k_prune_takes_what_neither_knows_nor_puts_out() -> None:
    """A channel that writes nothing is no loss to either measure."""
    model = tiny.build("llama")
    model.model.layers[1].mlp.down_proj.weight.data[:, 9] = 0
    trunk, asked = setting(model)
    counts = {place: int(place == (1, CHANNEL)) for place in asked.units}
    with torch.no_grad():
        found = KPrune().decide(trunk, replace(asked, spread=lambda scores: counts))
    assert found.removed[(1, CHANNEL)] == [9]
    assert float(found.scores[(1, CHANNEL)][9]) == 0 and float(found.scores[(1, CHANNEL)].sum()) == pytest.approx(2)


def test_fisher_scores_of_experts_and_what_gates_of_zero_leave() -> None:
    model = tiny.build("mixtral")
    trunk, asked = setting(model)
    units = find_units(asked.roles, [EXPERT_CHANNEL])
    asked = replace(asked, units={(one.layer, one.kind): one for one in units})
    ids = trunk.batches[0]["input_ids"]
    name = "model.layers.1.mlp.experts.down_proj"
    down_EOI = model.get_parameter(name).detach().double()
    with run_experts_one_by_one(model):
        found_U = GroupFisher().scores(trunk, asked)[(1, EXPERT_CHANNEL)]
        each = [own_gradients(model, ids[row : row + 1])[name] for row in range(len(ids))]
        expected_EI = torch.stack([(one * down_EOI).sum(1).square() for one in each]).sum(0)
        assert float((found_U.view(expected_EI.shape) / expected_EI - 1).abs().max()) <= 1e-3
        gates = {(one.layer, one.kind): torch.ones(one.count) for one in units}
        gates[(1, EXPERT_CHANNEL)][3 * 48 + 5] = 0  # of the last expert
        with gated(model, units, gates):
            without = mean_loss(model, ids)
        before = model.get_parameter(name).data.clone()
        model.get_parameter(name).data[3, :, 5] = 0
        assert float(without) == pytest.approx(float(mean_loss(model, ids)), rel=1e-9)
        assert float((model.get_parameter(name) - before).abs().max()) > 0


def test_thinet_adds_the_unit_that_costs_least() -> None:
    from types import SimpleNamespace

    weight_OI, x_TI = problem()
    columns_UN = torch.arange(12).view(6, 2)
    evidence = SimpleNamespace(
        writer_OI=weight_OI, stats=SimpleNamespace(gram_II=x_TI.T @ x_TI), columns_UN=columns_UN, count=6
    )
    order = ThiNet().score(evidence).argsort().tolist()  # type: ignore[arg-type]
    chosen: list[int] = []
    for _ in range(5):
        left = [unit for unit in range(6) if unit not in chosen]
        costs = [error(x_TI[:, one], weight_OI[:, one]) for unit in left for one in [mask([*chosen, unit], columns_UN)]]
        chosen.append(left[costs.index(min(costs))])
    assert order[:5] == chosen


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
    scores = {place: torch.arange(one.count, dtype=DOUBLE) for place, one in ask.units.items()}
    scores[(0, CHANNEL)] = torch.cat([torch.zeros(47, dtype=DOUBLE), torch.full((1,), 1e6, dtype=DOUBLE)])
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
    scores = {(layer, LAYER): torch.tensor(one, dtype=DOUBLE) for layer, one in enumerate(influences)}
    share_L = capped(torch.softmax(-torch.tensor(influences, dtype=DOUBLE) / 0.5, 0), torch.ones(3, dtype=DOUBLE), 0.9)
    assert float(share_L.sum()) == pytest.approx(0.9) and float(share_L.max()) < MOST

    def objective(share_L: torch.Tensor) -> float:
        """What stays influences so much, and the entropy of what goes."""
        part_L = share_L / 0.9
        return -float((torch.tensor(influences, dtype=DOUBLE) * part_L).sum() + 0.5 * (part_L * part_L.log()).sum())

    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        other_L = torch.rand(3, generator=generator, dtype=DOUBLE)
        assert objective(0.9 * other_L / other_L.sum()) <= objective(share_L)
    counts = influence(ask, scores)
    channels = [counts[(layer, CHANNEL)] for layer in range(3)]
    assert removed(ask, counts) >= 4000 and channels[0] < channels[2] < channels[1]
    # a temperature near zero would take all from one layer: it keeps a tenth, and the next one gives the rest
    cold_L = capped(torch.tensor([0.0, 1.0, 1e-9], dtype=DOUBLE), torch.ones(3, dtype=DOUBLE), 1.5)
    assert cold_L.tolist() == pytest.approx([0.0, MOST, 1.5 - MOST])


def test_balanced_takes_the_heads_that_cost_least() -> None:
    ask = demand(4000)
    cheap = {place: torch.ones(one.count, dtype=DOUBLE) for place, one in ask.units.items()}
    dear = {place: one * (1e-3 if place[1] == CHANNEL else 1.0) for place, one in cheap.items()}
    assert balanced(ask, dear)[(0, KV_GROUP)] == 0
    free = {place: one * (1e-3 if place[1] == KV_GROUP else 1.0) for place, one in cheap.items()}
    assert balanced(ask, free)[(0, KV_GROUP)] == 1
