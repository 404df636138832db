"""The dense stream beside the pruned one: its inputs, its outputs, and what is fitted to them."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import plain
import pytest
import tiny
import torch
from torch import nn
from transformers import PreTrainedModel

import llmprune
from llmprune.arch.discover import Unit, find_units
from llmprune.checkpoint.skeleton import run_experts_one_by_one
from llmprune.engine import schedule
from llmprune.engine.reconstruct import RATE, WARM_UP, reconstruct
from llmprune.engine.share import Share
from llmprune.engine.suspend import Call
from llmprune.linalg import scaled
from llmprune.solvers.retarget import retarget
from llmprune.statistics import DRIFT, GRAM, Stats

BATCHES = [{"input_ids": tiny.tokens(*shape, seed=seed)} for seed, shape in enumerate([(2, 24), (2, 24), (1, 17)])]
SHRINK = 0.9
PLAIN = ["llama", "gpt2", "gemma3", "qwen3", "phi3"]
ROUTED = ["mixtral", "qwen3-moe", "deepseek-v3", "gpt-oss"]


class Shrinking:
    """Work that multiplies every matrix by `SHRINK` instead of pruning it, or by nothing at all."""

    kinds = frozenset({GRAM, DRIFT})
    all_experts = False

    def __init__(self, units: list[Unit], factor: float, *, reconstructs: bool = False) -> None:
        self.factor, self.reconstructs = factor, reconstructs
        self.left = {unit.name: {spec.name for spec in unit.matrices} for unit in units}
        self.stats: dict[str, Stats] = {}
        self.fitted: dict[str, tuple[list[tuple[Call, torch.Tensor]], list[torch.Tensor]]] = {}
        self.finished: list[str] = []

    def enter(self, unit: Unit) -> None:
        pass

    def enter_dense(self, unit: Unit) -> None:
        pass

    def wanted(self, unit: Unit) -> set[str]:
        return self.left[unit.name]

    def solve(self, unit: Unit, stats: dict[str, Stats], transposed: dict[str, bool]) -> None:
        for spec in unit.matrices:
            if spec.name in stats:
                one = unit.module.get_parameter(spec.parameter.removeprefix(unit.prefix))
                (one if spec.index is None else one[spec.index]).mul_(self.factor)
        self.stats.update(stats)
        self.left[unit.name] -= stats.keys()

    def reconstruct(self, unit: Unit, calls: list[tuple[Call, torch.Tensor]], targets: list[torch.Tensor]) -> bool:
        self.fitted[unit.name] = (calls, targets)
        return True

    def finish(self, unit: Unit) -> None:
        self.finished.append(unit.name)

    def leave(self, unit: Unit) -> None:
        pass

    def complete(self) -> bool:
        return len(set(self.finished)) == len(self.left)


def shrink(model: PreTrainedModel, how: str, factor: float = SHRINK, *, reconstructs: bool = False) -> Shrinking:
    units = find_units(model, head=False)
    work = Shrinking(units, factor, reconstructs=reconstructs)
    with torch.no_grad(), run_experts_one_by_one(model):
        schedule.run(model, units, Share.alone(BATCHES), how, work)
    return work


def drift(dense_TI: np.ndarray, x_TI: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(X_dense - X)'X in float64, and what float32 may do to it: one rounding each, then a sum of T terms."""
    gap_TI = dense_TI - x_TI
    return gap_TI.T @ x_TI, (len(x_TI) + 3) * plain.U * (np.abs(gap_TI).T @ np.abs(x_TI))


@pytest.mark.parametrize("name", PLAIN)
def test_drift_is_that_of_the_pruned_model(name: str) -> None:
    model = tiny.build(name)
    work = shrink(model, "module")
    dense = plain.inputs(name, tiny.build(name), BATCHES)
    pruned = plain.inputs(name, model, BATCHES)
    moved = 0
    for matrix, stats in work.stats.items():
        expected_II, bound_II = drift(dense[matrix].x_TI, pruned[matrix].x_TI)
        assert stats.paired
        assert np.all(np.abs(stats.drift_II.double().numpy() - expected_II) <= bound_II), matrix
        moved += bool(np.abs(expected_II).max() > 0)
    # only what reads the input of the first layer cannot have moved
    assert moved >= len(work.stats) - 3


@pytest.mark.parametrize("how", ["layer", "module"])
@pytest.mark.parametrize("name", [*PLAIN, *ROUTED, "mamba"])
def test_nothing_drifts_where_nothing_is_pruned(name: str, how: str) -> None:
    for matrix, stats in shrink(tiny.build(name), how, factor=1.0).stats.items():
        assert stats.paired and not stats.drift_II.any(), matrix


@pytest.mark.parametrize("name", ROUTED)
def test_experts_are_compared_on_the_tokens_that_the_pruned_model_sends_them(name: str) -> None:
    model = tiny.build(name)
    seen: dict[str, dict[str, list[tuple[torch.Tensor, ...]]]] = defaultdict(lambda: defaultdict(list))

    def listen(which: str, listened: PreTrainedModel) -> None:
        for path, module in listened.named_modules():
            if path.endswith(".experts"):
                module.register_forward_pre_hook(
                    lambda _, args, path=path: seen[which][path].append(tuple(one.clone() for one in args))
                )

    work = shrink(model, "module")
    dense = tiny.build(name)
    listen("pruned", model)
    listen("dense", dense)
    plain.logits(model, BATCHES)
    plain.logits(dense, BATCHES)
    compared = 0
    for path, calls in seen["pruned"].items():
        for expert in range(tiny.EXPERTS):
            stats = work.stats.get(f"{path}.gate_up_proj[{expert}]")
            if stats is None:
                continue
            rows = [(args[1] == expert).any(1) for args in calls]
            x_TI = torch.cat([args[0][row] for args, row in zip(calls, rows, strict=True)]).double().numpy()
            both = zip(seen["dense"][path], rows, strict=True)
            dense_TI = torch.cat([args[0][row] for args, row in both]).double().numpy()
            expected_II, bound_II = drift(dense_TI, x_TI)
            assert np.all(np.abs(stats.drift_II.double().numpy() - expected_II) <= bound_II), (path, expert)
            compared += 1
    assert compared
    assert all(stats.paired for stats in work.stats.values())


class Streams(NamedTuple):
    """What enters every layer and what its modules put out, of all batches below each other, in float64."""

    entered: dict[str, np.ndarray]
    put_out: dict[str, np.ndarray]
    called: dict[str, list[tuple[torch.Tensor, ...]]]

    def before_mlp(self, layer: str, attention: str) -> np.ndarray:
        return self.entered[layer] + self.put_out[f"{layer}.{attention}"]


def streams(model: PreTrainedModel) -> Streams:
    found = Streams({}, {}, {})
    entered: dict[str, list[torch.Tensor]] = defaultdict(list)
    put_out: dict[str, list[torch.Tensor]] = defaultdict(list)

    def watch(path: str, module: nn.Module) -> None:
        def before(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if args and args[0].shape[-1] == model.config.hidden_size:
                entered[path].append(args[0])
            if path.endswith(".experts"):
                found.called.setdefault(path, []).append(args)

        def after(_: nn.Module, args: object, output: object) -> None:
            if isinstance(output, torch.Tensor) and output.shape[-1] == model.config.hidden_size:
                put_out[path].append(output)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    for path, module in model.named_modules():
        watch(path, module)
    plain.logits(model, BATCHES)
    for kept, mine in ((entered, found.entered), (put_out, found.put_out)):
        mine.update({at: torch.cat([one.flatten(0, -2) for one in each]).double().numpy() for at, each in kept.items()})
    return found


# The path of a layer's attention output and its last matrix, and of the MLP's last matrix.
WRITERS = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt-neox": ("attention.dense", "mlp.dense_4h_to_h"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_the_residual_stream_lacks_is_that_of_the_two_models(name: str) -> None:
    model = tiny.build(name)
    work = shrink(model, "module")
    dense, pruned = streams(tiny.build(name)), streams(model)
    inputs = plain.inputs(name, model, BATCHES)
    attention, mlp = WRITERS[name]
    for unit in find_units(model, head=False):
        for path in (attention, mlp):
            if path == attention:
                lack_TO = dense.entered[unit.name] - pruned.entered[unit.name]
                size_TO = np.abs(dense.entered[unit.name]) + np.abs(pruned.entered[unit.name])
            else:
                lack_TO = dense.before_mlp(unit.name, attention) - pruned.before_mlp(unit.name, attention)
                size_TO = sum(
                    np.abs(one.entered[unit.name]) + np.abs(one.put_out[f"{unit.name}.{attention}"])
                    for one in (dense, pruned)
                )
            matrix = f"{unit.name}.{path}.weight"
            x_TI = inputs[matrix].x_TI
            found_OI = work.stats[matrix].pull_OI(torch.zeros(lack_TO.shape[1], x_TI.shape[1])).double().numpy()
            # three roundings of the stream, one of each product, and a sum of T terms
            bound_OI = (len(x_TI) + 5) * plain.U * (size_TO.T @ np.abs(x_TI))
            assert np.all(np.abs(found_OI - lack_TO.T @ x_TI) <= bound_OI), matrix
        # and only these two write to it
        for matrix in {spec.name for spec in unit.matrices} - {f"{unit.name}.{path}.weight" for path in WRITERS[name]}:
            assert not work.stats[matrix].pull_OI(torch.zeros(4, work.stats[matrix].width)).any(), matrix


def test_a_layer_with_norms_after_its_halves_has_no_such_stream() -> None:
    work = shrink(tiny.build("gemma3"), "module")
    for matrix, stats in work.stats.items():
        assert not stats.pull_OI(torch.zeros(32, stats.width)).any(), matrix


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_share_what_their_block_lacks(name: str) -> None:
    """The last matrices of a block, on gated inputs of the pruned experts: shares in proportion to squared gates."""
    model, before = tiny.build(name), tiny.build(name)
    work = shrink(model, "module")
    dense, pruned = streams(before), streams(model)
    compared = 0
    for path, calls in pruned.called.items():
        layer = path.removesuffix(".mlp.experts")
        block = model.get_submodule(path)
        hidden_TD, chosen_TK, gates_TK = (torch.cat(each) for each in zip(*calls, strict=True))
        gates = gates_TK.double()
        inputs_of, rows_of = {}, {}
        output = torch.zeros(len(hidden_TD), hidden_TD.shape[1], dtype=torch.float64)
        for expert in range(tiny.EXPERTS):
            rows, places = torch.where(chosen_TK == expert)
            gate, up = (hidden_TD[rows].double() @ block.gate_up_proj[expert].double().T).chunk(2, dim=1)
            gate_N1 = gates[rows, places][:, None]
            inputs_of[expert], rows_of[expert] = gate_N1 * torch.nn.functional.silu(gate) * up, (rows, gate_N1)
            output[rows] += inputs_of[expert] @ before.get_submodule(path).down_proj[expert].double().T
        goal = dense.before_mlp(layer, "self_attn.o_proj") + dense.put_out[path]
        lack_TO = torch.from_numpy(goal - pruned.before_mlp(layer, "self_attn.o_proj")) - output
        for expert in range(tiny.EXPERTS):
            stats = work.stats.get(f"{path}.down_proj[{expert}]")
            if stats is None:
                continue
            rows, gate_N1 = rows_of[expert]
            share = gate_N1.square() / gates[rows].square().sum(1, keepdim=True) * lack_TO[rows]
            expected = (share.T @ inputs_of[expert]).detach()
            found = stats.pull_OI(torch.zeros(expected.shape)).double()
            # a float32 forward through one expert, and a difference of streams some ten times what is left
            assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max()), (path, expert)
            gram = (inputs_of[expert].T @ inputs_of[expert]).detach()
            assert float((stats.gram_II.double() - gram).abs().max()) <= 1e-5 * float(gram.abs().max())
            compared += 1
    assert compared


@pytest.mark.parametrize("how", ["layer", "module"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_fitting_sees_pruned_calls_and_dense_outputs(name: str, how: str) -> None:
    model, dense = tiny.build(name), tiny.build(name)
    outputs: dict[str, list[torch.Tensor]] = defaultdict(list)
    entered: dict[str, list[torch.Tensor]] = defaultdict(list)
    work = shrink(model, how, reconstructs=True)
    for unit in find_units(dense, head=False):
        unit.module.register_forward_hook(
            lambda _, args, out, at=unit.name: outputs[at].append(out if isinstance(out, torch.Tensor) else out[0])
        )
    for unit in find_units(model, head=False):
        unit.module.register_forward_pre_hook(lambda _, args, at=unit.name: entered[at].append(args[0]))
    plain.logits(dense, BATCHES)
    plain.logits(model, BATCHES)
    assert work.fitted.keys() == work.left.keys()
    for at, (calls, targets) in work.fitted.items():
        assert all(torch.equal(one, other) for one, other in zip(targets, outputs[at], strict=True))
        assert all(torch.equal(args[0], other) for ((args, _), _), other in zip(calls, entered[at], strict=True))
    assert "forward" not in vars(find_units(model, head=False)[0].module)


def test_retarget_solves_its_normal_equations() -> None:
    """V (G + L) = W (X_dense'X + L), in float64; the float32 solution may miss by its condition number."""
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(200, 24, generator=generator)
    dense_TI = x_TI + 0.1 * torch.randn(200, 24, generator=generator)
    weight_OI = torch.randn(8, 24, generator=generator)
    stats = Stats(24, frozenset({GRAM, DRIFT}))
    stats.update(x_TI, dense_TI)
    system = scaled(stats.gram_lower_II, 0.01)
    found = retarget(weight_OI, stats.pull_OI(weight_OI), system, 1.0).double().numpy()
    x, d, w = (one.double().numpy() for one in (x_TI, dense_TI, weight_OI))
    gram = x.T @ x
    damped = gram + 0.01 * np.diag(np.diag(gram))
    expected = w @ (d.T @ x + 0.01 * np.diag(np.diag(gram))) @ np.linalg.inv(damped)
    bound = 200 * plain.U * np.linalg.cond(damped) * np.abs(expected).max()
    assert np.abs(found - expected).max() <= bound
    half = retarget(weight_OI, stats.pull_OI(weight_OI), system, 0.5)
    assert torch.allclose(half, (weight_OI + torch.from_numpy(found).float()) / 2, atol=bound)


STORAGE = {"weight": torch.float32}


def fit(epochs: int, calls: int = 4) -> tuple[torch.Tensor, torch.Tensor, list[Call], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    dense = torch.randn(6, 8, generator=generator)
    kept = torch.rand(6, 8, generator=generator) < 0.5
    module = nn.Linear(8, 6, bias=False)
    start = dense * kept
    inputs: list[Call] = [((torch.randn(32, 8, generator=generator),), {}) for _ in range(calls)]
    targets = [args[0] @ dense.T for args, _ in inputs]
    now = [(call, call[0][0] @ start.T) for call in inputs]
    found, elsewhere = start.clone(), start.clone()
    places = {"weight": [found, elsewhere]}
    before, after = reconstruct(
        module, places, {"weight": kept}, STORAGE, now, targets, epochs=epochs, seed=0, share=Share.alone(now)
    )
    assert after < before
    assert not found[~kept].any() and torch.equal(found, elsewhere)
    return found, kept, inputs, targets


def test_fitting_approaches_least_squares() -> None:
    found, kept, inputs, targets = fit(epochs=150)
    x, y = torch.cat([args[0] for args, _ in inputs]).double(), torch.cat(targets).double()
    best = start = ours = 0.0
    for row in range(6):
        columns = kept[row].nonzero()[:, 0]
        solution = torch.linalg.lstsq(x[:, columns], y[:, row]).solution
        best += float((x[:, columns] @ solution - y[:, row]).square().sum())
        ours += float((x @ found[row].double() - y[:, row]).square().sum())
    dense_kept, _, _, _ = fit(epochs=1)
    start = float((x @ dense_kept.double().T - y).square().sum())
    assert best <= ours <= best + 0.05 * (start - best)


def test_the_first_step_of_fitting() -> None:
    """Adam's first step is the step length times the sign of the gradient, up to its epsilon."""
    found, kept, inputs, targets = fit(epochs=1, calls=1)
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(6, 8, generator=generator) * kept
    residual = inputs[0][0][0].double() @ start.double().T - targets[0].double()
    gradient = residual.T @ inputs[0][0][0].double()
    length = RATE * float(start[kept].square().mean().sqrt()) / WARM_UP
    expected = start.double() - length * gradient.sign() * kept
    assert torch.allclose(found.double(), expected, atol=1e-3 * length)


def test_fitting_never_makes_it_worse() -> None:
    module = nn.Linear(8, 6, bias=False)
    weight = module.weight.detach().clone()
    x_TI = torch.randn(16, 8, generator=torch.Generator().manual_seed(2))
    targets = [module(x_TI).detach()]
    calls: list[tuple[Call, torch.Tensor]] = [(((x_TI,), {}), targets[0])]
    kept = {"weight": torch.ones(6, 8, dtype=torch.bool)}
    places = {"weight": [weight.clone()]}
    before, after = reconstruct(
        module, places, kept, STORAGE, calls, targets, epochs=3, seed=0, share=Share.alone(calls)
    )
    assert after == before and torch.equal(places["weight"][0], weight)


def test_auto_keeps_its_zeros_and_fits_every_layer(tmp_path: Path) -> None:
    demo = Path(llmprune.__file__).parent / "demo" / "model"
    settings = {"method": "auto", "pattern": "2:4", "calibration": "demo", "samples": 8, "seqlen": 64}
    result = llmprune.prune(demo, out=tmp_path / "out", ignore="down_proj", **settings)
    report = json.loads((tmp_path / "out" / "llmprune.json").read_text())
    assert report["layers"] and all(row["fit"]["after"] < row["fit"]["before"] for row in report["layers"])
    state = result.model.state_dict()
    for row in report["tensors"]:
        groups = (state[row["name"]] == 0).unflatten(1, (-1, 4)).sum(-1)
        assert bool((groups == 2).all()) and int((state[row["name"]] == 0).sum()) == row["planned"]
