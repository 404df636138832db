"""How much of each matrix goes: uniform, by overrides, and over the whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import ALL, DEMO, having, plan
from runner import cli
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import llmprune
from llmprune import UserError
from llmprune.allocation import Dense
from llmprune.allocation.global_score import global_score
from llmprune.types import Budget, MatrixSpec, Pattern


def sparsities(*options: object) -> dict[str, float]:
    rows = plan(*options)["tensors"]
    return {row["name"]: row["planned"] / (row["shape"][0] * row["shape"][1]) for row in rows}


# Amounts.


def test_uniform_amounts() -> None:
    assert sparsities("--sparsity", 0.25) == dict.fromkeys(ALL, 0.25)
    assert sparsities("--pattern", "1:4") == dict.fromkeys(ALL, 0.75)
    assert sparsities("--sparsity", 0) == dict.fromkeys(ALL, 0.0)


def test_counts_are_rounded_half_up() -> None:
    rows = plan("--sparsity", 0.33333)["tensors"]
    for row in rows:
        count = row["shape"][0] * row["shape"][1]
        assert row["planned"] == int(0.33333 * count + 0.5)


def test_overrides(tmp_path: Path) -> None:
    overrides = [
        {"targets": "layers.0", "sparsity": 0.125},
        {"targets": ["layers.1.mlp", "re:.*2.*q_proj"], "sparsity": 0.75},
        {"targets": "o_proj", "pattern": "2:4"},
        # the last that matches counts
        {"targets": "layers.0.self_attn.o_proj", "sparsity": 0.0},
    ]
    expected = dict.fromkeys(ALL, 0.5)
    expected.update(dict.fromkeys(having("layers.0."), 0.125))
    expected.update(dict.fromkeys(having("layers.1.mlp", "layers.2.self_attn.q_proj"), 0.75))
    expected.update(dict.fromkeys(having("o_proj"), 0.5))
    expected["model.layers.0.self_attn.o_proj.weight"] = 0.0
    assert sparsities("--sparsity", 0.5, "--set", f"overrides={json.dumps(overrides)}") == expected

    # the same from a recipe, down to the bytes of the model
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"model": str(DEMO), "method": "magnitude", "sparsity": 0.5, "overrides": overrides}))
    ran = cli("prune", "--recipe", recipe, "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: float((state[name] == 0).float().mean()) for name in ALL} == expected
    for name in having("o_proj")[1:]:
        assert bool(((state[name] != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all())


def test_a_pattern_in_a_recipe_needs_no_quotes(tmp_path: Path) -> None:
    # YAML 1.1 reads 2:4 as the number 124, in base 60
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("pattern: 1:4\noverrides:\n- targets: mlp\n  pattern: 2:4\n")
    expected = {name: 0.5 if "mlp" in name else 0.75 for name in ALL}
    assert sparsities("--recipe", recipe) == expected
    assert sparsities("--set", "pattern=1:4", "--set", "overrides=[{targets: mlp, pattern: 2:4}]") == expected


def test_an_override_may_exempt_what_a_pattern_does_not_fit() -> None:
    override = "overrides=[{targets: down_proj, sparsity: 0.25}]"
    expected = {name: 0.25 if "down_proj" in name else 0.5 for name in ALL}
    assert sparsities("--pattern", "4:8", "--set", override) == expected
    assert cli("prune", DEMO, "--pattern", "4:8", "--dry-run", "--method", "magnitude").code == 2


# Global allocation.


def dense_of(matrices: list[np.ndarray]) -> Dense:
    """A model of these matrices, each a layer of its own."""
    specs = [MatrixSpec(f"m{number}", None, *one.shape, False) for number, one in enumerate(matrices)]

    def measure(kinds: Any, look: Any) -> None:
        raise AssertionError("no text is needed")

    layers = [[spec] for spec in specs]
    weights = [torch.from_numpy(one) for one in matrices]
    scores = [one.abs() for one in weights]
    return Dense(
        layers, lambda: zip(specs, weights, strict=True), lambda: zip(specs, scores, strict=True), measure, measure
    )


def smallest(matrices: list[np.ndarray], sparsity: float) -> list[np.ndarray]:
    """Which of all weights are the smallest, ties to the first: by sorting all of them."""
    everything = np.concatenate([np.abs(one).ravel() for one in matrices])
    count = int(np.floor(sparsity * len(everything) + 0.5))
    mask = np.zeros(len(everything), dtype=bool)
    mask[np.argsort(everything, kind="stable")[:count]] = True
    ends = np.cumsum([one.size for one in matrices])
    return [part.reshape(one.shape) for part, one in zip(np.split(mask, ends[:-1]), matrices, strict=True)]


def level(number: int) -> float:
    return [0.0, -0.0, 1.0, -1.0, 1.0000001, 0.5, 2**-149, -(2**-149), 2**-126, 3e38, 1e-3, -1e-3][number]


@settings(max_examples=150, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=5),
    sparsity=st.one_of(st.sampled_from([0.0, 0.5, 0.999]), st.floats(0, 0.9999)),
    levels=st.integers(1, 12),
    seed=st.integers(0, 2**16),
)
def test_global_amounts_are_those_of_sorting_everything(
    shapes: list[tuple[int, int]], sparsity: float, levels: int, seed: int
) -> None:
    # few different values: nearly every choice is a tie
    random = np.random.default_rng(seed)
    matrices = [np.vectorize(level)(random.integers(0, levels, shape)).astype(np.float32) for shape in shapes]
    dense = dense_of(matrices)
    specs = dense.specs
    budgets = global_score(dense, Budget(sparsity))
    found = [budgets[spec.name].pruned_of(spec.count) for spec in specs]
    assert found == [int(mask.sum()) for mask in smallest(matrices, sparsity)]
    assert sum(found) == Budget(sparsity).pruned_of(sum(spec.count for spec in specs))


@given(values=st.lists(st.integers(-5, 5), min_size=1, max_size=30), sparsity=st.floats(0, 0.999))
@settings(max_examples=60, deadline=None, database=None, derandomize=True)
def test_global_amounts_take_scores_of_either_sign(values: list[int], sparsity: float) -> None:
    scores = torch.tensor(values, dtype=torch.float32).mul(0.3)[:, None]
    specs = [MatrixSpec(str(number), None, 1, 1, False) for number in range(len(values))]
    parts = list(zip(specs, scores, strict=True))
    dense = Dense(
        [[spec] for spec in specs], list, lambda: [(s, one[None]) for s, one in parts], lambda *_: None, lambda *_: []
    )
    budgets = global_score(dense, Budget(sparsity))
    chosen = [budgets[spec.name].pruned_of(1) for spec in specs]
    order = sorted(range(len(values)), key=lambda index: values[index])
    expected = set(order[: Budget(sparsity).pruned_of(len(values))])
    assert {index for index, one in enumerate(chosen) if one} == expected


def test_global_allocation_refuses_a_pattern() -> None:
    dense = dense_of([np.ones((4, 4), dtype=np.float32)])
    with pytest.raises(UserError, match="'global' needs a sparsity: the pattern 2:4"):
        global_score(dense, Budget(0.5, Pattern(2, 4)))


def small(layout: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model whose layers differ in scale, so that a global threshold treats them differently."""
    torch.manual_seed(1)
    if layout == "gpt2":
        model: PreTrainedModel = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=2))
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    for number, parameter in enumerate(model.parameters()):
        parameter.data.mul_(1 + 0.3 * (number % 5))
    return model.to(dtype)


@pytest.mark.parametrize(
    ("layout", "dtype"), [("llama", torch.float32), ("llama", torch.bfloat16), ("gpt2", torch.float32)]
)
@pytest.mark.parametrize("sparsity", [0.3, 0.777])
def test_global_magnitude_prunes_the_smallest_of_the_model(
    tmp_path: Path, layout: str, dtype: torch.dtype, sparsity: float
) -> None:
    model = small(layout, dtype)
    model.save_pretrained(tmp_path / "model")
    dense = load_file(tmp_path / "model" / "model.safetensors")
    settings = {"method": "magnitude", "sparsity": sparsity, "allocation": "global"}
    report = llmprune.prune(tmp_path / "model", out=tmp_path / "out", **settings).report
    # GPT-2 stores inputs x outputs; ties count in the order outputs x inputs
    turned = layout == "gpt2"
    names = [row["name"] for row in report["tensors"]]
    assert len(names) == 3 * (4 if turned else 7)
    matrices = [(dense[name].T if turned else dense[name]).float().numpy() for name in names]
    expected = smallest(matrices, sparsity)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, mask in zip(names, expected, strict=True):
        pruned = torch.from_numpy(mask.T if turned else mask)
        assert torch.equal(stored[name], dense[name].masked_fill(pruned, 0)), name
    total = sum(mask.size for mask in expected)
    assert sum(row["planned"] for row in report["tensors"]) == int(sparsity * total + 0.5)
    amounts = {row["planned"] / (row["shape"][0] * row["shape"][1]) for row in report["tensors"]}
    assert max(amounts) - min(amounts) > 0.05
    # where it lies makes no difference: the same model in memory
    llmprune.prune(model, **settings)
    assert all(torch.equal(model.get_parameter(name), stored[name]) for name in names)


def test_global_allocation_is_over_the_chosen_matrices_alone() -> None:
    dense = load_file(DEMO / "model.safetensors")
    options = ("--sparsity", 0.4, "--allocation", "global", "--targets", "up_proj,q_proj", "--ignore", "layers.2")
    rows = plan(*options)["tensors"]
    names = [name for name in having("up_proj", "q_proj") if "layers.2." not in name]
    expected = smallest([dense[name].numpy() for name in names], 0.4)
    assert [(row["name"], row["planned"]) for row in rows] == [
        (name, int(mask.sum())) for name, mask in zip(names, expected, strict=True)
    ]
