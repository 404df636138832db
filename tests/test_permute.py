"""Channel permutation: the same function before pruning, and never less of the score after it."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from draws import normal
from safetensors.torch import load_file

import llmprune
from llmprune import UserError
from llmprune.arch.discover import find_units
from llmprune.arch.permutable import free_inputs
from llmprune.arch.roles import Roles
from llmprune.checkpoint.skeleton import run_experts_one_by_one
from llmprune.reordering import Reordering
from llmprune.solvers.assignment import assign
from llmprune.solvers.channel_order import channel_order, retained

LAYOUTS = ["llama", "qwen3", "gemma3", "opt", "gpt2", "gpt-neox", "phi3", "falcon", "bloom", "mixtral", "qwen3-moe"]
TEXT = tiny.tokens(4, 24)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_order_of_free_inputs_computes_the_same(layout: str) -> None:
    model = tiny.build(layout).double()
    with torch.no_grad(), run_experts_one_by_one(model):
        before = model(input_ids=TEXT).logits
    units, generator = find_units(model, head=False), torch.Generator().manual_seed(0)
    orders = {
        unit.name: [(one, torch.randperm(one.count, generator=generator)) for one in free]
        for unit, free in zip(units, free_inputs(Roles(model)), strict=True)
    }
    weights = {name: one.clone() for name, one in model.named_parameters()}
    for unit in units:
        Reordering(orders).apply(unit)
    moved = [name for name, one in model.named_parameters() if not torch.equal(one, weights[name])]
    with torch.no_grad(), run_experts_one_by_one(model):
        after = model(input_ids=TEXT).logits
    # float64 but for norms that some classes round to float32
    assert float((after - before).abs().max()) <= 1e-5 * float(before.abs().max())
    # values, attention outputs, and all matrices of MLPs or experts of every layer
    assert len(moved) >= 4 * len(units), moved


def test_an_assignment_is_the_best_of_all() -> None:
    for seed, size in itertools.product(range(4), (1, 2, 5, 7)):
        cost = np.random.default_rng(seed).normal(size=(size, size)).round(1)  # with ties
        found = assign(torch.from_numpy(-cost)).numpy()
        best = min(cost[range(size), list(one)].sum() for one in itertools.permutations(range(size)))
        assert sorted(found) == list(range(size))
        assert cost[range(size), found].sum() == pytest.approx(best)


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 4), (4, 8)])
def test_an_order_retains_more_and_never_less(keep: int, group: int) -> None:
    for seed in range(3):
        score_OI = normal(6, 32, seed=seed).abs() * (2 * normal(32, seed=seed + 9)).exp()
        order_I = channel_order(score_OI, keep, group)
        assert sorted(order_I.tolist()) == list(range(32))
        assert retained(score_OI[:, order_I], keep, group) > retained(score_OI, keep, group)
        # what is found is at least as good in its own order
        again_I = channel_order(score_OI[:, order_I], keep, group)
        assert retained(score_OI[:, order_I][:, again_I], keep, group) >= retained(score_OI[:, order_I], keep, group)


def test_two_groups_lie_between_what_was_given_and_the_best_of_all_orders() -> None:
    gained = 0
    for seed in range(8):
        score_OI = normal(5, 8, seed=seed).abs()
        halves = (
            [*half, *(one for one in range(8) if one not in half)] for half in itertools.combinations(range(8), 4)
        )
        best = max(retained(score_OI[:, half], 2, 4) for half in halves)
        found = retained(score_OI[:, channel_order(score_OI, 2, 4)], 2, 4)
        given = retained(score_OI, 2, 4)
        assert given <= found <= best * (1 + 1e-6)
        gained += found > given
    assert gained >= 4


@pytest.mark.parametrize("method", ["ria", "auto-fast"])
def test_a_permuted_model_keeps_more_and_is_two_of_four(method: str, tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    asked = {"method": method, "pattern": "2:4", "calibration": TEXT, "permute": True}
    report = llmprune.prune(model, out=tmp_path / "out", **asked).report
    assert any("more of the score" in note for note in report["run"]["notes"])
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for row in report["tensors"]:
        assert bool(((stored[row["name"]] == 0).unflatten(1, (-1, 4)).sum(2) == 2).all())
    llmprune.prune(model, out=tmp_path / "again", **asked)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(one, again[key]) for key, one in stored.items())
    resident = tiny.build("llama")
    llmprune.prune(resident, **asked)
    assert all(torch.equal(one, stored[name]) for name, one in resident.named_parameters() if name in stored)


def test_at_four_of_four_only_the_order_changes() -> None:
    """With nothing to prune the permuted model answers like the dense one."""
    model = tiny.build("llama")
    before = model(input_ids=TEXT).logits
    llmprune.prune(model, method="ria", pattern="4:4", calibration=TEXT, permute=True)
    assert torch.equal(model(input_ids=TEXT).logits, before)


def test_a_broken_off_run_is_resumed_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.save("llama", tmp_path / "model")
    asked = {"method": "ria", "pattern": "2:4", "calibration": TEXT, "permute": True}
    llmprune.prune(model, out=tmp_path / "whole", **asked)
    apply = Reordering.apply

    def stumble(self: Reordering, unit: object) -> None:
        if getattr(unit, "name", "").endswith(".2"):
            raise llmprune.RunError("stop")
        apply(self, unit)  # type: ignore[arg-type]

    monkeypatch.setattr(Reordering, "apply", stumble)
    with pytest.raises(llmprune.RunError, match="stop"):
        llmprune.prune(model, out=tmp_path / "broken", **asked)
    monkeypatch.undo()
    llmprune.prune(model, out=tmp_path / "broken", resume=True, **asked)
    whole, broken = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(one, broken[key]) for key, one in whole.items())


def test_what_cannot_be_permuted_is_refused() -> None:
    with pytest.raises(UserError, match="permute puts channels in an order that suits a pattern"):
        llmprune.prune(tiny.build("llama"), method="ria", sparsity=0.5, calibration=TEXT, permute=True)
    with pytest.raises(UserError, match="which parameters of a 'mamba' model"):
        llmprune.prune(tiny.build("mamba"), method="ria", pattern="2:4", calibration=TEXT, permute=True)
