"""Whole runs on one tiny model: every method with every update, refinement, amount and allocation, in pairs."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from pairwise import covering
from transformers import LlamaConfig, LlamaForCausalLM

import llmprune
from llmprune.allocation import ALLOCATORS
from llmprune.methods import METHODS, PRESETS, method_class
from llmprune.methods.composed import REFINEMENTS, UPDATES

KIND = [name for name in (*METHODS, *PRESETS) if method_class(name).kind == "weight"]
# Methods that go over whole layers take no steps after them (test_layers.py).
WEIGHT = [
    name for name in KIND if method_class(name).output == "plain" and not hasattr(method_class(name), "fit_layer")
]
# One of each way to count (by matrix, row and block), to solve, and to look at the model.
CHOSEN = ["magnitude", "wanda", "ria", "sparsegpt", "obc", "admm", "dsnot", "obert", "fisher", "auto"]
REFINE, UPDATE = ["none", *REFINEMENTS], ["none", *UPDATES]
SPARSITIES, PATTERNS = [0.5, 0.8], ["2:4", "4:8"]
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = tiny.tokens(2, 12)
SPREAD = covering(CHOSEN, list(ALLOCATORS), SPARSITIES, REFINE, UPDATE)
FIXED = covering(WEIGHT, PATTERNS, REFINE, UPDATE, [False, True])


@pytest.fixture(autouse=True)
def few_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune.allocation.evopress.GENERATIONS", 1)
    monkeypatch.setattr("llmprune.allocation.evopress.REACH", 1)
    monkeypatch.setattr("llmprune.allocation.dynamic.KEPT", 0.4)


def build() -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=tiny.VOCABULARY, num_key_value_heads=1, **SIZES)
        return LlamaForCausalLM(config).eval()


def pruned(**settings: Any) -> tuple[LlamaForCausalLM, list[dict[str, Any]]]:
    """The model, whose matrices have the planned zeros, all figures being finite."""
    model = build()
    rows = llmprune.prune(model, calibration=TEXT, **settings).report["tensors"]
    for row in rows:
        zeros = int((model.get_parameter(row["name"]) == 0).sum())
        assert zeros == row["planned"] + row["notes"].get("zeros_beyond_plan", 0), (settings, row)
    assert bool(torch.isfinite(model(input_ids=TEXT).logits).all()), settings
    return model, rows


@pytest.mark.parametrize("allocation", ALLOCATORS)
def test_every_method_takes_every_allocation(allocation: str) -> None:
    for method, spread, sparsity, refine, update in SPREAD:
        if spread != allocation:
            continue
        settings = {"method": method, "allocation": spread, "sparsity": sparsity, "refine": refine, "update": update}
        _, rows = pruned(**settings)
        sizes = [row["shape"][0] * row["shape"][1] for row in rows]
        # methods that count by row round once a row, the others once a matrix
        rounding = 0.5 * sum(row["shape"][0] for row in rows)
        assert abs(sum(row["planned"] for row in rows) - sparsity * sum(sizes)) <= rounding, settings


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_method_takes_every_pattern(pattern: str) -> None:
    keep, group = map(int, pattern.split(":"))
    for method, asked, refine, update, permute in FIXED:
        if asked != pattern:
            continue
        settings = {"method": method, "pattern": asked, "refine": refine, "update": update, "permute": permute}
        model, rows = pruned(**settings)
        for row in rows:
            zeros_OG = (model.get_parameter(row["name"]) == 0).unflatten(1, (-1, group)).sum(2)
            assert bool((zeros_OG >= group - keep).all()), (settings, row)


def test_the_coverings_hold_every_pair_and_repeat_themselves() -> None:
    assert covering(CHOSEN, list(ALLOCATORS), SPARSITIES, REFINE, UPDATE) == SPREAD
    assert {(one[0], one[1]) for one in SPREAD} == {(a, b) for a in CHOSEN for b in ALLOCATORS}
    assert {(one[3], one[4]) for one in FIXED} == {(a, b) for a in UPDATE for b in (False, True)}
    assert {(one[0], one[1]) for one in FIXED} == {(a, b) for a in WEIGHT for b in PATTERNS}
