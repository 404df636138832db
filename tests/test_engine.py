"""The engine against a plain forward: same outputs, same Gram matrices, in every layout and both schedules."""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache
from typing import Any

import plain
import pytest
import tiny
import torch
from engine_runs import SCHEDULES, assert_no_hooks, prune
from plain import assert_gram
from torch import nn
from transformers import PreTrainedModel

import llmprune
from llmprune.arch.discover import Unit, find_units
from llmprune.checkpoint.skeleton import run_experts_one_by_one
from llmprune.engine import schedule
from llmprune.engine.share import Share
from llmprune.kernels import dispatch
from llmprune.methods.weight.sparsegpt import SparseGPT
from llmprune.statistics import GRAM, Stats
from llmprune.types import Edit, Matrix, RunError

LAYOUTS = list(tiny.TINY)
ROUTED = [name for name in tiny.FUSED if name != "llama4"]
# Of unequal size and length.
BATCHES = [{"input_ids": tiny.tokens(*shape, seed=seed)} for seed, shape in enumerate([(2, 24), (2, 24), (1, 17)])]
TOKENS = sum(batch["input_ids"].numel() for batch in BATCHES)


class Watching:
    """Work that changes no weight: keeps the statistics, and the order in which it was called."""

    kinds = frozenset({GRAM})
    reconstructs = False

    def __init__(self, units: list[Unit], *, all_experts: bool) -> None:
        self.all_experts = all_experts
        self.left = {unit.name: {spec.name for spec in unit.matrices} for unit in units}
        self.logits: list[torch.Tensor] = []
        self.stats: dict[str, Stats] = {}
        self.transposed: dict[str, bool] = {}
        self.events: list[str] = []

    def enter(self, unit: Unit) -> None:
        self.events.append(f"enter {unit.name}")

    def wanted(self, unit: Unit) -> set[str]:
        return self.left[unit.name]

    def solve(self, unit: Unit, stats: dict[str, Stats], transposed: dict[str, bool]) -> None:
        assert not stats.keys() & self.stats.keys(), "solved twice"
        self.stats.update(stats)
        self.transposed.update(transposed)
        self.left[unit.name] -= stats.keys()

    def finish(self, unit: Unit) -> None:
        pass

    def leave(self, unit: Unit) -> None:
        self.events.append(f"leave {unit.name}")

    def complete(self) -> bool:
        return len(self.logits) == len(BATCHES)  # so that the forwards go on to their end


def watch(model: PreTrainedModel, how: str, *, head: bool = False, all_experts: bool = False) -> Watching:
    units = find_units(model, head=head)
    work = Watching(units, all_experts=all_experts)

    def forward(**batch: Any) -> None:
        work.logits.append(model(**batch).logits)

    with torch.no_grad(), run_experts_one_by_one(model):
        schedule.run(forward, units, Share.alone(BATCHES), how, work)  # type: ignore[arg-type]
    return work


@lru_cache
def watched(name: str, how: str, all_experts: bool = False) -> Watching:
    return watch(tiny.build(name), how, all_experts=all_experts)


@lru_cache
def reference(name: str, everyone: bool = False) -> dict[str, plain.Inputs]:
    return plain.inputs(name, tiny.build(name), BATCHES, everyone=everyone)


def matrices(model: PreTrainedModel) -> set[str]:
    return {spec.name for unit in find_units(model, head=False) for spec in unit.matrices}


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


# --- solving nothing ---


@pytest.mark.parametrize("how", SCHEDULES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_forward_is_the_plain_forward(name: str, how: str) -> None:
    model = tiny.build(name)
    work = watch(model, how)
    assert_same(work.logits, plain.logits(tiny.build(name), BATCHES))
    assert_same(list(model.state_dict().values()), list(tiny.build(name).state_dict().values()))
    # one unit at a time: each is left before the next is entered (the last one stays where it ends)
    layers = [unit.name for unit in find_units(model, head=False)]
    assert len(layers) == model.config.num_hidden_layers
    order = [f"{what} {layer}" for layer in layers for what in ("enter", "leave")]
    assert work.events[: len(order) - 1] == order[:-1]
    assert_no_hooks(model)


@pytest.mark.parametrize("how", SCHEDULES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_gram_matrices_are_those_of_a_plain_forward(name: str, how: str) -> None:
    work = watched(name, how)
    assert work.stats.keys() == matrices(tiny.build(name))
    for key, stats in work.stats.items():
        inputs = reference(name)[key]
        assert stats.tokens == len(inputs.x_TI), key
        assert_gram(stats.gram_II, inputs, key)
        inputs_first = name == "gpt2" or (name in tiny.INPUTS_FIRST and ".experts." in key)
        assert work.transposed[key] == inputs_first, key


@pytest.mark.parametrize("how", SCHEDULES)
def test_gram_matrix_of_the_head(how: str) -> None:
    model = tiny.build("llama")
    work = watch(model, how, head=True)
    assert_gram(work.stats["lm_head.weight"].gram_II, reference("llama")["lm_head.weight"], "lm_head")
    assert_same(work.logits, plain.logits(model, BATCHES))


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
SHARED = {
    "llama": [QKV, ("mlp.gate_proj", "mlp.up_proj")],
    "qwen3": [QKV, ("mlp.gate_proj", "mlp.up_proj")],
    "opt": [QKV],
    "mixtral": [QKV],
    "deepseek-v3": [("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")],
    "llama4": [QKV, ("feed_forward.shared_expert.gate_proj", "feed_forward.shared_expert.up_proj")],
    "qwen3-next": [QKV, ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")],
}


@pytest.mark.parametrize("how", SCHEDULES)
@pytest.mark.parametrize("name", SHARED)
def test_matrices_with_one_input_share_one_statistics_object(name: str, how: str) -> None:
    work = watched(name, how)
    layer = find_units(tiny.build(name), head=False)[1].name
    for group in SHARED[name]:
        assert len({id(work.stats[f"{layer}.{short}.weight"]) for short in group}) == 1, group


@pytest.mark.parametrize("name", LAYOUTS)
def test_statistics_are_shared_exactly_where_inputs_are_equal(name: str) -> None:
    by_object: dict[int, set[str]] = defaultdict(set)
    by_value: dict[bytes, set[str]] = defaultdict(set)
    for key, stats in watched(name, "layer").stats.items():
        by_object[id(stats)].add(key)
        by_value[reference(name)[key].x_TI.tobytes()].add(key)
    assert sorted(map(sorted, by_object.values())) == sorted(map(sorted, by_value.values()))


# --- experts ---


@pytest.mark.parametrize("how", SCHEDULES)
@pytest.mark.parametrize("name", tiny.FUSED)
def test_tokens_of_the_experts_add_up(name: str, how: str) -> None:
    counted: dict[str, int] = defaultdict(int)
    for key, stats in watched(name, how).stats.items():
        if key.endswith("]"):
            counted[key.partition("[")[0]] += stats.tokens
    assert counted and set(counted.values()) == {TOKENS * tiny.TINY[name].num_experts_per_tok}


@pytest.mark.parametrize("how", SCHEDULES)
@pytest.mark.parametrize("name", ROUTED)
def test_all_experts_sees_every_token_and_changes_no_output(name: str, how: str) -> None:
    work = watched(name, how, True)
    assert_same(work.logits, watched(name, how).logits)
    assert work.stats.keys() == matrices(tiny.build(name))
    for key, stats in work.stats.items():
        assert stats.tokens == TOKENS, key
        assert_gram(stats.gram_II, reference(name, everyone=True)[key], key)


def test_all_experts_is_refused_where_routing_cannot_be_replaced() -> None:
    with pytest.raises(RunError, match=r"all_experts.*takes no expert index"):
        watch(tiny.build("llama4"), "layer", all_experts=True)


# --- what is measured is what the pruned model sees ---


def grams_of_a_run(model: PreTrainedModel, how: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Prune `model` in place; the Gram matrices that the method was given."""
    grams = {}
    solve = SparseGPT.solve

    def recorded(self: SparseGPT, matrix: Matrix, stats: Stats, budget: Any) -> Edit:
        grams[matrix.name] = stats.gram_II
        return solve(self, matrix, stats, budget)

    monkeypatch.setattr(SparseGPT, "solve", recorded)
    rows = [row for batch in BATCHES for row in batch["input_ids"]]
    llmprune.prune(model, method="sparsegpt", sparsity=0.5, calibration=rows, batch_size=2, schedule=how)
    assert grams.keys() == matrices(model)
    return grams


# No experts: inside their block, schedule "module" too measures before it solves.
@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "gemma3", "mamba"])
def test_schedule_module_measures_with_pruned_predecessors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build(name)
    grams = grams_of_a_run(model, "module", monkeypatch)
    pruned = plain.inputs(name, model, BATCHES)
    for key, gram_II in grams.items():
        assert_gram(gram_II, pruned[key], key)


def test_matrices_that_share_an_input_are_solved_at_once_where_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = prune(tiny.build("llama"), "layer", overrides=[{"targets": ["k_proj"], "sparsity": 0.25}])
    monkeypatch.setattr("llmprune.pipeline.FILLED", ())
    together: list[list[str]] = []
    plain = SparseGPT.solve_together

    def recorded(self: SparseGPT, matrices: list[Matrix], stats: Stats, budget: Any) -> list[Edit]:
        together.append(sorted(one.name.split(".")[-2] for one in matrices))
        return plain(self, matrices, stats, budget)

    monkeypatch.setattr(SparseGPT, "solve_together", recorded)
    found = prune(tiny.build("llama"), "layer", overrides=[{"targets": ["k_proj"], "sparsity": 0.25}])
    # q, k and v share an input, but k has a budget of its own
    groups = [["down_proj"], ["gate_proj", "up_proj"], ["k_proj"], ["o_proj"], ["q_proj", "v_proj"]]
    layer_by_layer = sorted(groups * tiny.build("llama").config.num_hidden_layers)
    # the first is the forecast's
    assert sorted(together[1:]) == layer_by_layer
    for ours, theirs in zip(found.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(ours == 0, theirs == 0)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_schedule_layer_measures_with_dense_predecessors_in_pruned_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llama")
    grams = grams_of_a_run(model, "layer", monkeypatch)
    pruned, dense = plain.inputs("llama", model, BATCHES), reference("llama")
    for key, gram_II in grams.items():
        if key.startswith("model.layers.0."):
            assert_gram(gram_II, dense[key], key)
        if key.split(".")[-2] in ("q_proj", "k_proj", "v_proj"):
            assert_gram(gram_II, pruned[key], key)
        else:
            with pytest.raises(AssertionError, match="times the bound"):
                assert_gram(gram_II, pruned[key], key)


def twice(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """An MLP that is gone through twice, with the same matrices."""
    for _ in range(2):
        x = x + self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return x


@pytest.mark.parametrize("retarget", [0.0, 0.5])
def test_a_matrix_that_is_used_twice_is_measured_at_both_uses(retarget: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", twice)
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)
    model = tiny.build("llama")
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].detach().flatten(0, 1)))
        for name, module in model.model.layers[0].mlp.named_children()
        if name != "act_fn"
    ]
    for batch in BATCHES:
        model(**batch)
    for hook in hooks:
        hook.remove()
    given: dict[str, torch.Tensor] = {}
    solve = SparseGPT.solve

    def recorded(self: SparseGPT, matrix: Matrix, stats: Stats, budget: Any) -> Edit:
        given[matrix.name] = stats.gram_II
        return solve(self, matrix, stats, budget)

    monkeypatch.setattr(SparseGPT, "solve", recorded)
    rows = [row for batch in BATCHES for row in batch["input_ids"]]
    settings = {"method": "sparsegpt", "sparsity": 0.5, "retarget": retarget, "schedule": "module", "batch_size": 2}
    report = llmprune.prune(model, calibration=rows, **settings).report
    for short, inputs in seen.items():
        x_TI = torch.cat(inputs).double()
        expected_II = x_TI.T @ x_TI
        error = (given[f"model.layers.0.mlp.{short}.weight"] - expected_II).abs().max()
        assert error <= 1e-5 * expected_II.abs().max(), short
    for row in report["tensors"]:
        assert (row["notes"].get("statistics") == schedule.USED_AGAIN) == (".mlp." in row["name"]), row["name"]
        assert row["tokens"] == (2 if ".mlp." in row["name"] else 1) * TOKENS


def test_gram_matrices_of_a_layers_experts_grow_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[int] = []
    run = dispatch.run

    def counted(operation: str, *operands: Any) -> Any:
        if operation == "gram_update":
            launches.append(len(operands) // 2)
        return run(operation, *operands)

    monkeypatch.setattr(dispatch, "run", counted)
    model = tiny.build("qwen3-moe")
    text = list(tiny.tokens(4, 24))
    llmprune.prune(model, method="sparsegpt", sparsity=0.5, calibration=text, batch_size=2)
    # two batches through two layers with experts: what enters the attention, its last matrix and every expert has one
    # width, what is inside the experts another
    assert launches.count(2 + tiny.EXPERTS) >= 4 and launches.count(tiny.EXPERTS) >= 4
