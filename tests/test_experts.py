"""Experts left out: as if the router could not choose them; and what the scores are made of."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plain
import pytest
import tiny
import torch
from runner import cli
from safetensors import safe_open
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, OlmoeConfig, PreTrainedModel

import llmprune
from llmprune.arch.discover import decoder_layers, expert_blocks
from llmprune.methods.expert.alignment import best_order, channel_axes
from llmprune.methods.expert.hc_smoe import average_linkage
from llmprune.methods.expert.m_smoe import clusters_around
from llmprune.methods.structural import DropExperts
from llmprune.solvers.assignment import assign
from llmprune.types import UserError

TEXT = [row.tolist() for row in tiny.tokens(6, 20, seed=3)]
MODELS = ["mixtral", "qwen3-moe", "olmoe", "deepseek-v3", "gpt-oss", "qwen3-next"]
METHODS = ["reap", "expert-frequency", "expert-norm", "expert-subset"]


@pytest.fixture(autouse=True)
def more_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """OLMoE, whose gates are not renormalised, and a DeepSeek with two groups of four experts, one chosen."""
    deep = copy.deepcopy(tiny.TINY["deepseek-v3"])
    deep.n_routed_experts, deep.n_group, deep.topk_group = 8, 2, 1
    monkeypatch.setitem(tiny.TINY, "deepseek-v3", deep)
    olmoe = OlmoeConfig(
        **{**tiny.MODERN, "intermediate_size": 24},
        **tiny.SPECIAL,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=False,
    )
    monkeypatch.setitem(tiny.TINY, "olmoe", olmoe)


def moe_blocks(model: PreTrainedModel) -> dict[int, Any]:
    """The blocks of router and experts, by layer."""
    found = {}
    for index, layer in enumerate(decoder_layers(model)[1]):
        for path, _ in expert_blocks(layer):
            found[index] = layer.get_submodule(path.rpartition(".")[0])
    return found


def router_of(block: Any) -> Any:
    return getattr(block, "gate", None) or block.router


@contextlib.contextmanager
def forbidden(model: PreTrainedModel, gone: dict[int, set[int]]) -> Iterator[None]:
    """While active, the router logits of some experts are minus infinity, and so are their correction biases."""
    masks = {}
    for index, block in moe_blocks(model).items():
        router = router_of(block)
        masks[router.weight.data_ptr()] = sorted(gone.get(index, ()))
        bias = getattr(router, "e_score_correction_bias", None)
        if bias is not None:
            bias[sorted(gone.get(index, ()))] = -torch.inf
    linear = F.linear

    def masked(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        out = linear(x, weight, *rest)
        if weight.data_ptr() in masks:
            out[..., masks[weight.data_ptr()]] = -torch.inf
        return out

    F.linear = masked
    try:
        yield
    finally:
        F.linear = linear


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with plain.eager_experts(model):
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def gone_of(report: dict[str, Any], model: PreTrainedModel) -> dict[int, set[int]]:
    kept = report["structure"]["dropped"]["kept_experts"]
    count = {index: router_of(block).weight.shape[0] for index, block in moe_blocks(model).items()}
    return {int(index): set(range(count[int(index)])) - set(stay) for index, stay in kept.items()}


@pytest.mark.parametrize("name", MODELS)
def test_leaving_out_is_minus_infinity(name: str, tmp_path: Path) -> None:
    source = tiny.save(name, tmp_path / "dense")
    report = llmprune.prune(source, out=tmp_path / "out", method="reap", drop_experts=0.25, calibration=TEXT).report
    # all in float64, where products of other sizes round alike (DeepSeek's router insists on float32)
    dtype = torch.float32 if name == "deepseek-v3" else torch.float64
    dense, ids = tiny.build(name).to(dtype), tiny.tokens(3, 16)
    whole = logits(dense, ids)
    gone = gone_of(report, dense)
    assert gone.keys() == moe_blocks(dense).keys() and all(gone.values())
    with forbidden(dense, gone):
        expected = logits(dense, ids)
    assert float((expected - whole).abs().max()) > 1e-3  # the mask does something
    loaded = tiny.build(name)
    llmprune.prune(loaded, method="reap", drop_experts=0.25, calibration=TEXT)
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    for small in (stored, loaded):
        # routers take the softmax in float32, over fewer terms
        assert float((logits(small.to(dtype), ids) - expected).abs().max()) <= 1e-6
        assert report["totals"]["params_after"] == sum(one.numel() for one in small.parameters())
    saved = sum(row["saved"] for row in report["structure"]["scores"])
    # the correction bias of DeepSeek's routers is no parameter
    biases = 2 * 2 if name == "deepseek-v3" else 0
    assert saved - biases == report["totals"]["params_before"] - report["totals"]["params_after"]


def test_experts_on_disk_are_renumbered(tmp_path: Path) -> None:
    source = tiny.save("mixtral", tmp_path / "dense")
    report = llmprune.prune(source, out=tmp_path / "out", drop_experts=0.5, calibration=TEXT).report
    assert report["recipe"]["method"] == "reap"
    with (
        safe_open(source / "model.safetensors", "pt") as old,
        safe_open(tmp_path / "out/model.safetensors", "pt") as new,
    ):
        names = [key for key in new.keys() if ".experts." in key]  # noqa: SIM118
        assert {key.split(".experts.")[1].split(".")[0] for key in names} == {"0", "1"}
        for index, stay in report["structure"]["dropped"]["kept_experts"].items():
            for place, expert in enumerate(stay):
                for key in (one for one in names if f"layers.{index}." in one and f"experts.{place}." in one):
                    before = key.replace(f"experts.{place}.", f"experts.{expert}.")
                    assert torch.equal(new.get_tensor(key), old.get_tensor(before))


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "deepseek-v3", "gpt-oss"])
def test_scores_are_their_formulas(name: str) -> None:
    model = tiny.build(name)
    seen: dict[int, Any] = {}
    for index, block in moe_blocks(model).items():
        block.experts.register_forward_pre_hook(lambda _, args, index=index: seen.update({index: args}))
    model.requires_grad_(False)
    logits(model, torch.tensor(TEXT))
    scores = {
        method: llmprune.prune(tiny.build(name), method=method, drop_experts=0.25, calibration=TEXT).report["structure"]
        for method in METHODS[:3]
    }
    found = {method: {row["name"]: row["score"] for row in one["scores"]} for method, one in scores.items()}
    path = decoder_layers(model)[0]
    for index, (x_TD, chosen_TK, gates_TK) in seen.items():
        gates_TK = own_gates(name, moe_blocks(model)[index], x_TD, chosen_TK) if name != "gpt-oss" else gates_TK
        for expert in range(tiny.TINY[name].num_local_experts):
            rows, places = torch.where(chosen_TK == expert)
            norms = own_expert(name, moe_blocks(model)[index].experts, expert, x_TD[rows].double()).norm(dim=1)
            expected = {
                "expert-frequency": float(len(rows)),
                "expert-norm": float(norms.sum()),
                "reap": float((gates_TK[rows, places].double() * norms).mean()) if len(rows) else 0.0,
            }
            for method, value in expected.items():
                got = found[method][f"{path}.{index} expert {expert}"]
                assert math.isclose(got, value, rel_tol=1e-5), (method, index, expert)


def own_gates(name: str, block: Any, x_TD: torch.Tensor, chosen_TK: torch.Tensor) -> torch.Tensor:
    """The gates by the papers' formulas: softmax or sigmoid, renormalised or not, scaled."""
    logits_TE = x_TD.double() @ block.gate.weight.double().T
    scores_TE = logits_TE.sigmoid() if name == "deepseek-v3" else logits_TE.softmax(-1)
    gates_TK = scores_TE.gather(1, chosen_TK)
    if name != "olmoe":
        gates_TK = gates_TK / gates_TK.sum(1, keepdim=True)
    return gates_TK * (tiny.TINY[name].routed_scaling_factor if name == "deepseek-v3" else 1.0)


@torch.no_grad()
def own_expert(name: str, experts: Any, expert: int, x_TD: torch.Tensor) -> torch.Tensor:
    if name == "gpt-oss":
        both = x_TD @ experts.gate_up_proj[expert].double() + experts.gate_up_proj_bias[expert].double()
        gate, up = both[:, ::2].clamp(max=experts.limit), both[:, 1::2].clamp(-experts.limit, experts.limit)
        inner = (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
        return inner @ experts.down_proj[expert].double() + experts.down_proj_bias[expert].double()
    gate, up = (x_TD @ experts.gate_up_proj[expert].double().T).chunk(2, -1)
    return (F.silu(gate) * up) @ experts.down_proj[expert].double().T


@pytest.mark.parametrize("name", ["mixtral", "deepseek-v3"])
def test_subsets_are_the_best_of_all(name: str) -> None:
    report = llmprune.prune(tiny.build(name), method="expert-subset", drop_experts=0.25, calibration=TEXT).report
    model = tiny.build(name)
    calls: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for index, block in moe_blocks(model).items():
        block.register_forward_hook(lambda _, args, out, index=index: calls.update({index: (args[0], out)}))
    logits(model, torch.tensor(TEXT))
    experts, groups = tiny.TINY[name].num_local_experts, getattr(tiny.TINY[name], "n_group", None) or 1
    size = experts // groups
    choices = list(itertools.product(*(range(start, start + size) for start in range(0, experts, size))))
    for index, (x, whole) in dict(calls).items():
        errors = {}
        for gone in choices:
            other = tiny.build(name)
            with torch.no_grad(), forbidden(other, {index: set(gone)}):
                errors[gone] = float((moe_blocks(other)[index](x) - whole).double().square().sum())
        kept = report["structure"]["dropped"]["kept_experts"][str(index)]
        best = min(errors, key=errors.__getitem__)
        assert set(kept) == set(range(experts)) - set(best)
        assert math.isclose(report["structure"]["notes"]["squared_error"][str(index)], errors[best], rel_tol=1e-4)


def test_groups_lose_the_same_number(tmp_path: Path) -> None:
    for method in (*METHODS, "hc-smoe", "m-smoe"):
        report = llmprune.prune(tiny.build("deepseek-v3"), method=method, drop_experts=0.25, calibration=TEXT).report
        for stay in report["structure"]["dropped"]["kept_experts"].values():
            assert [sum(one // 4 == group for one in stay) for group in (0, 1)] == [3, 3], method
    with pytest.raises(UserError, match="2 groups"):
        llmprune.prune(tiny.build("deepseek-v3"), drop_experts=0.375, calibration=TEXT)


def test_average_linkage() -> None:
    points = torch.tensor([[0.0], [10.0], [0.5], [11.5], [4.0]])
    assert average_linkage(points, 3) == [[0, 2], [1, 3], [4]]
    assert average_linkage(points, 2) == [[0, 2, 4], [1, 3]]  # mean distances: 3.75 to the left, 6.75 to the right
    assert average_linkage(points, 5) == [[0], [1], [2], [3], [4]]


@pytest.mark.parametrize("method", [{"method": "hc-smoe"}, {"method": "m-smoe", "options": {"align": False}}])
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_merged_experts_are_averages_by_use(name: str, method: dict[str, Any], tmp_path: Path) -> None:
    source = tiny.save(name, tmp_path / "dense")
    result = llmprune.prune(source, out=tmp_path / "out", drop_experts=0.5, calibration=TEXT, **method)
    structure, dense = result.report["structure"], tiny.build(name)
    for index, block in moe_blocks(dense).items():
        used = torch.tensor(structure["figures"]["expert_tokens"][str(index)])
        kept = structure["dropped"]["kept_experts"][str(index)]
        small = moe_blocks(result.model)[index]
        for cluster in structure["notes"]["clusters"][str(index)]:
            place = max(cluster, key=lambda expert, used=used: (float(used[expert]), -expert))
            assert torch.equal(router_of(small).weight[kept.index(place)], router_of(block).weight[place])
            for key, parameter in block.experts.named_parameters():
                mean = sum(float(used[one]) * parameter[one] for one in cluster) / float(used[cluster].sum())
                merged = small.experts.get_parameter(key)[kept.index(place)]
                assert torch.allclose(merged, mean, atol=1e-6)


def test_assignments_are_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        gain = torch.randn(6, 6, generator=generator, dtype=torch.float64).round(decimals=1)  # ties among them
        best = max(float(gain[range(6), one].sum()) for one in itertools.permutations(range(6)))
        found = assign(gain)
        assert sorted(found.tolist()) == list(range(6))
        assert math.isclose(float(gain[range(6), found].sum()), best, abs_tol=1e-12)
    hidden = torch.randperm(200, generator=generator)
    clear = torch.eye(200)[hidden] + 0.4 * torch.rand(200, 200, generator=generator)
    assert torch.equal(assign(clear), hidden)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "deepseek-v3"])
def test_channels_are_put_back_in_order(name: str) -> None:
    """An expert with its channels in another order computes the same, and is brought back onto the original."""
    block: Any = next(iter(moe_blocks(tiny.build(name)).values())).experts
    x, axes = torch.randn(5, 32, dtype=torch.float64), channel_axes(block)
    before = own_expert(name, block, 1, x)
    whole = {key: one.detach().clone() for key, one in block.named_parameters()}
    order = torch.randperm(axes["down_proj"].index_CN.shape[0], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for key, axis in axes.items():
            block.get_parameter(key)[1] = axis.permuted(whole[key][1], order)
            assert not torch.equal(block.get_parameter(key)[1], whole[key][1])
    # sums over channels in another order, float64
    assert torch.allclose(own_expert(name, block, 1, x), before, atol=1e-12)
    shuffled, to = ({key: one[1] for key, one in values.items()} for values in (dict(block.named_parameters()), whole))
    back = best_order(axes, shuffled, to)
    assert torch.equal(order[back], torch.arange(len(order)))
    assert all(torch.equal(axis.permuted(shuffled[key], back), to[key]) for key, axis in axes.items())


def test_the_most_used_experts_gather_the_others() -> None:
    asked = DropExperts(1, (0,), 5, 3, 1)
    logits_TE = torch.tensor([[1.0, -1.0, 2.0, 0.1, -3.0], [0.0, 1.0, 0.1, 2.0, 2.9]], dtype=torch.float64)
    used = torch.tensor([9.0, 7.0, 1.0, 2.0, 0.0], dtype=torch.float64)
    # cosines to expert 0 and to expert 1: 2 (1.0, -0.67), 3 (0.05, 0.67), 4 (-0.72, 1.0)
    assert clusters_around(logits_TE.T @ logits_TE, used, asked) == [[0, 2], [1, 3, 4]]


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
def test_copies_in_another_order_are_merged_without_loss(name: str) -> None:
    """All experts of a layer are one, each with its channels in another order: whatever is merged, nothing is lost."""
    model, ids = tiny.build(name), tiny.tokens(2, 12)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in moe_blocks(model).values():
            axes = channel_axes(block.experts)
            for expert in range(1, 4):
                order = torch.randperm(axes["down_proj"].index_CN.shape[0], generator=generator)
                for key, parameter in block.experts.named_parameters():
                    parameter[expert] = axes[key].permuted(parameter[0], order) if key in axes else parameter[0]
    before = logits(model, ids)
    settings: dict[str, Any] = {"drop_experts": 0.5, "calibration": TEXT, "layout": "remote-code"}
    other = llmprune.prune(copy.deepcopy(model), method="m-smoe", options={"align": False}, **settings)
    assert float((logits(other.model, ids) - before).abs().max()) > 1e-2
    result = llmprune.prune(model, method="m-smoe", **settings)
    # an average of equal numbers, and sums over channels in another order, float32
    assert float((logits(result.model, ids) - before).abs().max()) <= 1e-5


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "deepseek-v3", "gpt-oss"])
def test_with_code_of_its_own_every_router_row_stays(name: str, tmp_path: Path) -> None:
    """The reference: the dense model, each expert replaced by its cluster's average, its router untouched."""
    source, ids = tiny.save(name, tmp_path / "dense"), tiny.tokens(2, 12)
    settings: dict[str, Any] = {"method": "hc-smoe", "drop_experts": 0.5, "calibration": TEXT}
    result = llmprune.prune(source, out=tmp_path / "out", layout="remote-code", **settings)
    dense = tiny.build(name)
    for index, block in moe_blocks(dense).items():
        used = torch.tensor(result.report["structure"]["figures"]["expert_tokens"][str(index)])
        for cluster in result.report["structure"]["notes"]["clusters"][str(index)]:
            share = (
                used[cluster] / used[cluster].sum()
                if float(used[cluster].sum())
                else torch.ones(len(cluster)) / len(cluster)
            )
            with torch.no_grad():
                for parameter in block.experts.parameters():
                    parameter[cluster] = torch.einsum("e,e...->...", share.float(), parameter[cluster])
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert float((logits(small, ids) - logits(dense, ids)).abs().max()) <= 1e-5
    assert sum(one.numel() for one in small.parameters()) == result.report["totals"]["params_after"]
    plain = llmprune.prune(source, out=tmp_path / "plain", **settings)
    rows = sum(block.gate.weight[0].numel() if hasattr(block, "gate") else 0 for block in moe_blocks(dense).values())
    assert result.report["totals"]["params_after"] >= plain.report["totals"]["params_after"] + rows
    # a model in memory
    memory = llmprune.prune(tiny.build(name), layout="remote-code", **settings).model
    assert float((logits(memory, ids) - logits(dense, ids)).abs().max()) <= 1e-5


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    source = tiny.save("mixtral", tmp_path / "dense")
    for settings, says in (
        ({"drop_experts": 0.75}, "every token to 2"),
        ({"drop_experts": 0.1}, "at least one"),
        ({"drop_experts": 0.5, "drop_layers": 1, "method": "reap"}, "cannot do drop_layers"),
        ({"drop_experts": 0.25, "method": "expert-subset", "options": {"most": 3}}, "more than most"),
    ):
        with pytest.raises(UserError, match=says):
            llmprune.prune(source, out=tmp_path / "out", calibration=TEXT, **settings)
    with pytest.raises(UserError, match="not told which experts"):
        llmprune.prune(tiny.save("llama4", tmp_path / "l4"), out=tmp_path / "out", drop_experts=0.25, calibration=TEXT)
    assert {one.name for one in tmp_path.iterdir()} == {"dense", "l4"}


def test_then_weights(tmp_path: Path) -> None:
    source = tiny.save("mixtral", tmp_path / "dense")
    llmprune.prune(source, out=tmp_path / "fewer", drop_experts=0.5, calibration=TEXT)
    llmprune.prune(tmp_path / "fewer", out=tmp_path / "out", method="wanda", sparsity=0.5, calibration=TEXT)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    weight = decoder_layers(model)[1][0].mlp.experts.down_proj
    assert weight.shape[0] == 2 and float((weight == 0).float().mean()) == 0.5


def test_the_end_says_how_many_experts_stay(tmp_path: Path) -> None:
    config = copy.deepcopy(tiny.TINY["mixtral"])
    config.vocab_size = 512  # that of the tokenizer
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    for file in (Path(llmprune.__file__).parent / "demo" / "model").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "model")
    drop = ("--method", "expert-frequency", "--drop-experts", 0.25, "--samples", 2, "--seqlen", 16)
    ran = cli("prune", tmp_path / "model", "--out", tmp_path / "out", *drop)
    assert ran.code == 0, ran.err
    stay = config.num_local_experts * 3 // 4
    assert f"out: {stay} experts a layer, " in ran.out
