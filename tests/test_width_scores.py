"""Scores of heads, channels and hidden dimensions, against gradients and sums of their own."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn
from transformers import PreTrainedModel
from width_problems import error, mask, problem, setting

from llmprune.arch.discover import find_units as layers_of
from llmprune.arch.roles import Roles
from llmprune.arch.units import CHANNEL, EXPERT_CHANNEL, KV_GROUP, RESIDUAL, find_units
from llmprune.checkpoint.skeleton import run_experts_one_by_one
from llmprune.checkpoint.slicing import HIDDEN
from llmprune.engine.gates import gated
from llmprune.engine.gradients import squared_gates
from llmprune.engine.trunk import Trunk
from llmprune.methods.structural import Narrow
from llmprune.methods.width.group_fisher import GroupFisher
from llmprune.methods.width.llm_pruner import LLMPruner
from llmprune.methods.width.magnitude import GroupMagnitude
from llmprune.methods.width.minitron import Minitron
from llmprune.methods.width.thinet import ThiNet
from llmprune.solvers.groups import own_energy
from llmprune.weights import Resident


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
    expected_D = torch.zeros(32, dtype=torch.float64)
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
    expected_D = torch.zeros(32, dtype=torch.float64)
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
            gates = {key: torch.ones(one.count, dtype=torch.float64) for key, one in units.items()}
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
