"""LoSparse: as many numbers as the budget leaves, parts that are best for each other, and a split that peft adds up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from draws import normal
from peft import PeftModel
from transformers import AutoModelForCausalLM

import llmprune
from llmprune import UserError
from llmprune.methods import method_of
from llmprune.methods.weight.losparse import LoSparse
from llmprune.recipe import Recipe
from llmprune.types import Budget, Matrix


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_parts_have_what_the_budget_leaves(share: float) -> None:
    b_OR, a_RI, sparse_OI, pruned_OI = LoSparse(share=share).parts(normal(30, 20), Budget(0.5))
    numbers = b_OR.numel() + a_RI.numel() + int((~pruned_OI).sum())
    assert numbers == 300 and len(a_RI) == int(share * 300 / 50)
    assert not bool(sparse_OI[pruned_OI].any())


def test_each_part_is_the_best_for_the_other_and_turns_only_help() -> None:
    weight_OI, last = normal(24, 16, seed=1), np.inf
    for turns in (1, 2, 5, 20):
        b_OR, a_RI, sparse_OI, _ = LoSparse(iterations=turns).parts(weight_OI, Budget(0.6))
        rest = (weight_OI - sparse_OI).double().numpy()
        low = (b_OR @ a_RI).double().numpy()
        error = float(np.linalg.norm(rest - low))
        assert error <= last * (1 + 1e-6)
        last = error
    # nothing of that rank is closer to what the sparse part leaves (Eckart and Young), once it has settled
    best = np.sqrt((np.linalg.svd(rest, compute_uv=False)[len(a_RI) :] ** 2).sum())
    assert best <= error <= 1.02 * best
    # and the sparse part holds the largest of what the other leaves
    left = (weight_OI - b_OR @ a_RI).abs()
    assert float(left[sparse_OI == 0].max()) <= float(left[sparse_OI != 0].min())


def test_a_matrix_that_is_such_a_sum_comes_back() -> None:
    spikes_OI = torch.zeros(40, 40)
    spikes_OI.view(-1)[torch.randperm(1600, generator=torch.Generator().manual_seed(3))[:40]] = 20.0
    weight_OI = normal(40, 2, seed=1) @ normal(2, 40, seed=2) + spikes_OI
    # 160 numbers for the rank of 2 and 160 for the 40 spikes
    edit = LoSparse(iterations=60).solve(Matrix("m", weight_OI), None, Budget(0.8))
    assert edit.notes["rank"] == 2 and edit.notes["error_of_sum"] < 1e-3


def test_the_split_adds_up_to_the_sum(tmp_path: Path) -> None:
    for layout in ("llama", "gpt2"):
        folder = tmp_path / layout
        asked: dict[str, Any] = {"method": "losparse", "sparsity": 0.5}
        model = tiny.save(layout, folder / "model")
        whole = llmprune.prune(model, out=folder / "sum", **asked)
        split = llmprune.prune(model, out=folder / "split", split=True, **asked)
        assert whole.report["totals"]["zeros"] == 0
        kept = sum(row["shape"][0] * row["shape"][1] - row["achieved"] for row in split.report["tensors"])
        numbers = sum(row["notes"]["rank"] * sum(row["shape"]) for row in split.report["tensors"])
        assert kept + numbers == sum(row["shape"][0] * row["shape"][1] for row in split.report["tensors"]) // 2
        adapted = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(folder / "split"), folder / "split" / "adapter"
        )
        expected = AutoModelForCausalLM.from_pretrained(folder / "sum")
        with torch.no_grad():
            found, wanted = (one(input_ids=tiny.tokens()).logits for one in (adapted, expected))
        # float32 sums in another order, through three layers
        assert float((found - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


def test_what_it_cannot_do_is_refused(tmp_path: Path) -> None:
    model = tiny.build("llama")
    with pytest.raises(UserError, match="no N:M patterns, so 2:4 is not for it"):
        llmprune.prune(model, method="losparse", pattern="2:4")
    with pytest.raises(UserError, match="'losparse' has no mask to refine or update"):
        method_of(Recipe(method="losparse", update="least-squares"))
    with pytest.raises(UserError, match="split stores an adapter beside a model"):
        llmprune.prune(model, method="losparse", sparsity=0.5, split=True)


def test_a_split_that_a_later_step_would_lose_is_refused(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    stage = {"method": "losparse", "sparsity": 0.5, "options": {"split": True}}
    later = {"method": "magnitude", "sparsity": 0.5}
    for asked in ({"method": "losparse", "sparsity": 0.5, "split": True, "steps": 2}, {"stages": [stage, later]}):
        with pytest.raises(UserError, match="would lose"):
            llmprune.prune(model, out=tmp_path / "out", **asked)
    assert [one.name for one in tmp_path.iterdir()] == ["model"]
