"""Every depth method against its formula."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path

import pytest
import runner
import tiny
import torch
from depth_models import TEXT, load, logits, skip
from torch.nn import functional as F
from transformers import PreTrainedModel, Qwen2Config

import llmprune
from llmprune.arch.discover import decoder_layers, find_units
from llmprune.arch.sublayers import HALVES, halves
from llmprune.engine.fold import measure
from llmprune.engine.gradients import saliency
from llmprune.engine.search import WHOLE, losses_without
from llmprune.engine.similarity import turns
from llmprune.engine.trunk import Trunk
from llmprune.kernels.product import FastLinear
from llmprune.methods.depth.flattengpt import disjoint
from llmprune.methods.depth.laco import collapse, mixed
from llmprune.methods.depth.linearpatch import hadamard
from llmprune.types import UserError
from llmprune.weights import Resident


@torch.no_grad()
def loss(model: PreTrainedModel, rows: list[list[int]] = TEXT) -> float:
    ids = torch.tensor(rows)
    nll = F.cross_entropy(logits(model, ids)[:, :-1].double().flatten(0, 1), ids[:, 1:].flatten())
    return float(nll)


def trunk_of(model: PreTrainedModel, rows: list[list[int]] = TEXT) -> Trunk:
    model.requires_grad_(False)
    return Trunk(model, find_units(model, head=False), [{"input_ids": torch.tensor(rows)}], Resident(model))


@pytest.fixture
def five(monkeypatch: pytest.MonkeyPatch) -> None:
    """A llama of five layers as `tiny.TINY["llama"]`."""
    config = copy.deepcopy(tiny.TINY["llama"])
    config.num_hidden_layers = 5
    monkeypatch.setitem(tiny.TINY, "llama", config)


# Scores.


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_turns_are_what_hooks_see(name: str) -> None:
    model, seen = tiny.build(name), []
    layers = decoder_layers(model)[1]
    for layer in layers:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args or (kwargs["hidden_states"],))[0].double()), with_kwargs=True
        )
    layers[-1].register_forward_hook(lambda _, args, out: seen.append(out.double()))
    logits(model, torch.tensor(TEXT))
    states, trunk = list(seen), trunk_of(tiny.build(name))
    for span, last in itertools.product((1, 2, 3), (False, True)):
        found = turns(trunk, span, last_token=last)
        for k in range(len(states) - span):
            a, b = (one[:, -1:] if last else one for one in (states[k], states[k + span]))
            cos = F.cosine_similarity(a, b, dim=-1)
            # float32 forwards differ in the last bits; angles lose half the digits near 0 and 1
            assert math.isclose(found.cosine_distance[k], float((1 - cos).mean()), abs_tol=1e-6)
            assert math.isclose(found.angle[k], float(torch.arccos(cos.clamp(-1, 1)).mean()) / math.pi, abs_tol=1e-5)
    assert trunk.runs == 6 * 3  # one pass a call: each layer runs once


def test_shortgpt_angular_and_keep_first_choose_by_their_rules(five: None) -> None:
    model = tiny.build("llama")
    influence = turns(trunk_of(model), 1).cosine_distance
    windows = turns(trunk_of(model), 2).angle
    best = min(range(4), key=windows.__getitem__)
    chosen = {
        "shortgpt": sorted(sorted(range(5), key=influence.__getitem__)[:2]),
        "angular": [best, best + 1],
        "keep-first": [3, 4],
    }
    for method, layers in chosen.items():
        text = None if method == "keep-first" else TEXT
        report = llmprune.prune(tiny.build("llama"), method=method, drop_layers=2, calibration=text).report
        assert report["structure"]["dropped"]["layers"] == layers, method


@pytest.mark.parametrize("remember", [True, False])
def test_sleb_is_the_greedy_search_and_reports_the_true_loss(
    remember: bool, five: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # without room, every sequence is a chunk
    monkeypatch.setattr("llmprune.engine.search.SHARE", 0.25 if remember else 0.0)
    source = tiny.save("llama", tmp_path / "dense")
    options = {"protect_first": 0, "protect_last": 0}
    result = llmprune.prune(
        source, out=tmp_path / "out", method="sleb", drop_layers=2, calibration=TEXT, options=options
    )
    notes = result.report["structure"]["notes"]
    single = {index: loss(skip(tiny.build("llama"), [index])) for index in range(5)}
    first = min(single, key=single.__getitem__)
    pairs = {index: loss(skip(tiny.build("llama"), [first, index])) for index in range(5) if index != first}
    second = min(pairs, key=pairs.__getitem__)
    assert notes["removed_in_order"] == [first, second]
    assert math.isclose(notes["loss_dense"], loss(tiny.build("llama")), rel_tol=1e-6)
    assert math.isclose(notes["loss_after_each"][0], single[first], rel_tol=1e-6)
    assert math.isclose(notes["loss_after_each"][1], loss(result.model), rel_tol=1e-6)
    for row, index in zip(result.report["structure"]["scores"], range(5), strict=True):
        assert math.isclose(row["score"], single[index], rel_tol=1e-6)
    # the first round: the model, and variant k from layer k + 1 on
    runs = 5 + 4 + 3 + 2 + 1
    # the second: nothing runs through `first`; where the way there is remembered, all begin behind it
    begin = [0, *(index + 1 for index in pairs)]
    begin = [max(one, first + 1) if remember else one for one in begin]
    runs += sum(len([layer for layer in range(one, 5) if layer != first]) for one in begin)
    assert notes["layer_runs"] == runs < notes["layer_runs_naive"] == 4 * 5 + 3 * 4


@pytest.mark.parametrize("kind", [WHOLE, "mlp"])
def test_losses_in_chunks_are_those_in_one_go(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 1 and of 2 of 5 batches of different lengths; no more states at once than fit."""
    model, held = tiny.build("llama").requires_grad_(False), []
    units, weights = find_units(model, head=False), Resident(model)
    batches = [{"input_ids": tiny.tokens(count, 11, seed=count)} for count in (1, 2, 1, 3, 1)]
    parts, gone = [(index, kind) for index in (0, 2)], {(1, kind)}
    trunk = Trunk(model, units, batches, weights)
    whole = losses_without(trunk, parts, gone)
    enter = Trunk.enter
    monkeypatch.setattr(Trunk, "enter", lambda self: held.append(len(self.batches)) or enter(self))
    for size in (1, 2):
        bytes_of_all = 8 * 11 * 32 * 4 * (len(parts) + 2)
        monkeypatch.setattr("llmprune.engine.search._room", lambda _, room=-(-size * bytes_of_all // 5): room)
        chunked = Trunk(model, units, batches, weights)
        assert losses_without(chunked, parts, gone) == whole
        assert chunked.runs == trunk.runs
    assert held == [1, 1, 1, 1, 1, 2, 2, 1]


def test_pairs_are_the_best_disjoint_ones() -> None:
    scores = {index: one for index, one in enumerate([0.4, 0.1, 0.5, 0.9, 0.2, 0.3, 0.2], 1) if index != 4}
    for count in (1, 2, 3):
        free = [
            one for one in itertools.combinations(scores, count) if all(b - a > 1 for a, b in itertools.pairwise(one))
        ]
        assert disjoint(scores, count) == min(free, key=lambda one: sum(scores[index] for index in one))
    with pytest.raises(UserError, match="only 4 layers"):
        disjoint(scores, 5)


@pytest.mark.parametrize("silent", [{1: HALVES}, {2: HALVES}, {1: ["mlp"], 2: ["attention"]}], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3"])
def test_flattened_layers_lose_nothing_that_fits(
    name: str, silent: dict[int, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where two layers have no more than one attention and one MLP that write, the flat layer is the two of them."""
    monkeypatch.setitem(tiny.TINY, "qwen2", Qwen2Config(**tiny.MODERN, **tiny.SPECIAL, use_sliding_window=False))
    model = tiny.build(name)
    for index, gone in silent.items():
        layer = model.model.layers[index]
        for half in gone:
            for parameter in halves(layer)[half].parameters:
                layer.get_parameter(parameter).data.zero_()
    model.save_pretrained(tmp_path / "dense")
    result = llmprune.prune(
        tmp_path / "dense", out=tmp_path / "out", method="flattengpt", drop_layers=[2], calibration=TEXT
    )
    assert result.report["structure"]["dropped"]["layers"] == [2]
    ids = tiny.tokens(2, 12)
    expected = logits(model, ids)
    # a norm's gain is multiplied into the matrices behind it, float32
    assert float((logits(load(tmp_path / "out"), ids) - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_what_a_flat_layer_writes_is_least_squares() -> None:
    """The writers solve the regression of the two layers' outputs on what the flat layer has inside (LAPACK's solver)."""
    dense, ids = tiny.build("llama"), tiny.tokens(24, 20, seed=3)
    rows = [row.tolist() for row in ids]
    flat = llmprune.prune(
        tiny.build("llama"), method="flattengpt", drop_layers=[2], calibration=rows, options={"damping": 1e-7}
    )
    assert flat.report["structure"]["notes"]["flattened"] == [[1, 2]]
    seen: dict[str, torch.Tensor] = {}

    def watch(name: str, module: torch.nn.Module) -> None:
        module.register_forward_hook(lambda _, args, out: seen.update({name: (args or (None,))[0], f"{name}=": out}))

    for name, layer in (
        ("one", dense.model.layers[1]),
        ("two", dense.model.layers[2]),
        ("flat", flat.model.model.layers[1]),
    ):
        watch(f"{name}", layer)
        for half, module in (("attention", layer.self_attn.o_proj), ("mlp", layer.mlp.down_proj)):
            watch(f"{name} {half}", module)
    logits(dense, ids)
    logits(flat.model, ids)
    attended = seen["one attention="] + seen["two attention="]
    entered = seen["one"] + seen["flat attention="]
    left = {"attention": attended, "mlp": seen["two="] - entered}
    for half, module in (("attention", "self_attn.o_proj"), ("mlp", "mlp.down_proj")):
        x_TI, target_TO = seen[f"flat {half}"].flatten(0, 1).double(), left[half].flatten(0, 1).double()
        best_OI = torch.linalg.lstsq(x_TI, target_TO).solution.T
        weight_OI = flat.model.model.layers[1].get_submodule(module).weight.detach().double()
        error, least = ((x_TI @ one.T - target_TO).square().sum() for one in (weight_OI, best_OI))
        # float32 inputs, recorded on weights that were rounded once more
        assert float(least) <= float(error) <= (1 + 1e-4) * float(least), half
        assert torch.allclose(weight_OI, best_OI, atol=1e-2 * float(best_OI.abs().max())), half


def test_flattening_is_refused_where_it_is_not_plain(five: None, tmp_path: Path) -> None:
    for name, layers, says in (
        ("qwen3", 1, "self_attn.k_norm.weight belongs to all heads"),
        ("opt", 1, "one norm before each"),
        ("gemma3", 1, "one norm before each"),
        ("llama", 3, "only 2 layers"),
        ("llama", [1, 2], "layer 2 would go into the one before it"),
        ("llama", [0], "layer 0 would go"),
    ):
        source = tiny.save(name, tmp_path / f"{name}{layers}")
        with pytest.raises(UserError, match=says):
            llmprune.prune(source, out=tmp_path / "out", method="flattengpt", drop_layers=layers, calibration=TEXT)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt", "gpt2", "gpt-neox", "bloom", "gpt-oss", "deepseek-v3"])
def test_halves_filled_with_zeros_are_halves_left_out(name: str, tmp_path: Path) -> None:
    source = tiny.save(name, tmp_path / "dense")
    result = llmprune.prune(source, out=tmp_path / "out", method="blockpruner", drop_layers=1, calibration=TEXT)
    notes = result.report["structure"]["notes"]
    # the search silences modules; the checkpoint holds zeros or lacks a layer
    assert math.isclose(notes["loss_after_each"][-1], loss(result.model), rel_tol=1e-5)
    removed = [tuple(one) for one in notes["removed_in_order"]]
    assert len(set(removed)) == 2
    alone = {index for index, half in removed if (index, {"attention": "mlp"}.get(half, "attention")) not in removed}
    assert ("zeros" in notes.get("halves", "")) == bool(alone)


def test_llm_drop_removes_the_attention_that_matters_least(tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "dense")
    report = llmprune.prune(source, out=tmp_path / "out", method="llm-drop", drop_layers=1, calibration=TEXT).report
    model, x, y = tiny.build("llama"), {}, {}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda _, args, index=index: x.update({index: args[0].double()}))
        layer.self_attn.register_forward_hook(lambda _, args, out, index=index: y.update({index: out[0].double()}))
    logits(model, torch.tensor(TEXT))
    score = {index: float((1 - F.cosine_similarity(x[index], x[index] + y[index], dim=-1)).mean()) for index in x}
    found = {row["name"]: row["score"] for row in report["structure"]["scores"]}
    for index, one in score.items():
        assert math.isclose(found[f"model.layers.{index} attention"], one, abs_tol=1e-6)
    best = min(score, key=score.__getitem__)
    assert report["structure"]["changed"] == [f"model.layers.{best}.self_attn.o_proj.weight"]
    assert report["totals"]["params_after"] == report["totals"]["params_before"]


def test_taylor_scores_are_weights_times_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune.kernels.eligibility.SMALLEST_ONEDNN", 0)
    model = tiny.build("qwen3")
    with FastLinear():
        found = saliency(trunk_of(model))
    model.requires_grad_(True)
    ids = torch.tensor(TEXT)
    F.cross_entropy(model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for layer, one in zip(model.model.layers, found, strict=True):
        expected = sum(float((p.detach() * p.grad).abs().sum()) for p in layer.parameters() if p.dim() >= 2)
        assert math.isclose(one, expected, rel_tol=1e-4)


# Replacing what is dropped.


def test_laco_is_the_formula_and_not_the_running_copy() -> None:
    model = tiny.build("llama")
    trunk = trunk_of(model)
    thetas = [dict(layer.named_parameters()) for layer in model.model.layers]
    mixtures = collapse([(index, {index: 1.0}) for index in range(3)], 0, 2)
    assert len(mixtures) == 1
    values = mixed(trunk, *mixtures[0])
    for name, theta in thetas[0].items():
        formula = theta + sum(thetas[k][name] - theta for k in (1, 2))
        running = theta.clone()
        for k in (1, 2):
            running = running + (thetas[k][name] - running)
        assert torch.allclose(values[name], formula, atol=1e-6)
        assert torch.allclose(running, thetas[2][name], atol=1e-6)  # what subtracting the running copy comes to
    # a collapse into a collapse counts each old layer by what it has become
    nested = collapse(collapse([(index, {index: 1.0}) for index in range(3)], 1, 1), 0, 1)
    assert nested == [(0, {2: 1.0})]


def test_laco_drops_what_is_asked(five: None, tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "dense")
    result = llmprune.prune(source, out=tmp_path / "out", method="laco", drop_layers=3, calibration=TEXT)
    notes = result.report["structure"]["notes"]
    assert result.model.config.num_hidden_layers == 2
    assert sum(one["layers"] for one in notes["collapses"]) == 3
    assert all(one["similarity"] >= notes["threshold"] for one in notes["collapses"])


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "mixtral", "gpt-oss"])
def test_replaceme_solves_its_normal_equations_and_folds_exactly(name: str, tmp_path: Path) -> None:
    model = tiny.build(name)
    trunk = trunk_of(model)
    fit = measure(trunk, 0, 1, lambda _, after: after)
    map_DD, error = fit.solve(0.0)
    # gradient M'(M A - Y + R) with M A - Y + R = M (A - I) - E
    gradient_DD = fit.gram_DD @ (map_DD - torch.eye(len(map_DD), dtype=torch.float64)) - fit.cross_DD
    assert float(gradient_DD.norm()) <= 1e-8 * float(fit.cross_DD.norm())
    errors = [error, *(fit.solve(damping)[1] for damping in (1e-3, 0.1, 10.0))]
    assert errors == sorted(errors) and errors[-1] <= fit.error_before
    source = tiny.save(name, tmp_path / "dense")
    options = {"damping": 0.01}
    result = llmprune.prune(
        source, out=tmp_path / "out", method="replaceme", drop_layers=[1], calibration=TEXT, options=options
    )
    notes = result.report["structure"]["notes"]
    # the error of the model on disk is the one that the algebra predicts
    small = trunk_of(result.model)
    with torch.no_grad():
        got = small.run(0, small.enter())[0].double()
        dense = trunk.run(1, trunk.run(0, trunk.enter()))[0].double()
    assert math.isclose(float((got - dense).square().sum()), notes["squared_error_fitted"], rel_tol=1e-3)
    assert notes["squared_error_fitted"] < notes["squared_error_dropped"]


def test_a_map_cannot_be_folded_where_a_norm_follows() -> None:
    with pytest.raises(UserError, match="normalises"):
        llmprune.prune(tiny.build("gemma3"), method="replaceme", drop_layers=[1], calibration=TEXT)


def test_linearpatch_and_its_basis() -> None:
    for width in (32, 24, 7):
        basis_DD = hadamard(width)
        assert torch.allclose(basis_DD @ basis_DD.T, torch.eye(width, dtype=torch.float64), atol=1e-12)
    report = llmprune.prune(tiny.build("llama"), method="linearpatch", drop_layers=1, calibration=TEXT).report
    notes = report["structure"]["notes"]
    assert notes["squared_distance_to_patch_fitted"] < notes["squared_distance_to_patch_dropped"]


def test_streamline_trains_one_layer_for_a_window(five: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # every product is large enough for the fast path, which has no gradients
    monkeypatch.setattr("llmprune.kernels.eligibility.SMALLEST_ONEDNN", 0)
    source = tiny.save("llama", tmp_path / "dense")
    options = {"steps": 20, "learning_rate": 1e-3}
    outs = [
        llmprune.prune(
            source, out=tmp_path / out, method="llm-streamline", drop_layers=2, calibration=TEXT, options=options
        )
        for out in ("a", "b")
    ]
    notes = outs[0].report["structure"]["notes"]
    assert notes["mean_squared_error_after"] < notes["mean_squared_error_before"]
    assert runner.product(tmp_path / "a") == runner.product(tmp_path / "b")
    # the trained layer of the saved model has the error that was reported
    start = notes["trained_layer"]
    dense, small = trunk_of(tiny.build("llama")), trunk_of(outs[0].model)
    with torch.no_grad():
        states, mine = dense.enter(), small.enter()
        for index in range(start + 3):
            states = dense.run(index, states)
        for index in range(start + 1):
            mine = small.run(index, mine)
    error = float((mine[0].double() - states[0].double()).square().mean())
    assert math.isclose(error, notes["mean_squared_error_after"], rel_tol=1e-4)
