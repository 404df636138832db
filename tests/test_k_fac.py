"""K-FAC: both factors against autograd, scores and weights against the whole Kronecker matrix in float64."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

import llmprune
from llmprune.arch.discover import find_units
from llmprune.checkpoint.skeleton import run_experts_one_by_one
from llmprune.engine.curvature import output_grams
from llmprune.engine.gradients import loss_gradients
from llmprune.engine.trunk import Trunk
from llmprune.linalg import scaled
from llmprune.methods.weight.k_fac import KFAC, TOLERANCE
from llmprune.solvers.groups import damped, eliminate
from llmprune.solvers.least_squares import least_squares
from llmprune.statistics import GRAM, Stats
from llmprune.types import Budget, Matrix, Pattern
from llmprune.weights import Resident

# of unequal length: the loss is a sum over tokens, not a mean of means
SAMPLES = [tiny.tokens(1, length, seed=length) for length in (9, 24, 17)]
# Gram matrices are summed in float32: 50 products, each rounded to 2^-24 of itself
SUMMED = 1e-5


def trunk_of(model: PreTrainedModel, samples: list[torch.Tensor]) -> tuple[Trunk, list[list[str]]]:
    units = find_units(model, head=False)
    names = [sorted({spec.parameter.removeprefix(one.prefix) for spec in one.matrices}) for one in units]
    return Trunk(model, units, [{"input_ids": one} for one in samples], Resident(model)), names


def keep(outputs: dict[str, torch.Tensor], name: str, module: Any, args: Any, output: torch.Tensor) -> None:
    outputs[name] = output


def whole(lower_OO: torch.Tensor) -> torch.Tensor:
    return lower_OO.tril() + lower_OO.tril(-1).T


@pytest.mark.parametrize("layout", ["llama", "gpt2", "gemma3", "opt", "phi3"])
def test_gradients_at_outputs_are_those_of_autograd(layout: str) -> None:
    model = tiny.build(layout).double()
    trunk, names = trunk_of(model, SAMPLES)
    with torch.no_grad():
        found = dict(output_grams(trunk, names))
    expected: dict[str, torch.Tensor] = {}
    for ids in SAMPLES:
        outputs: dict[str, torch.Tensor] = {}
        hooks = [
            module.register_forward_hook(partial(keep, outputs, f"{name}.weight"))
            for name, module in model.named_modules()
        ]
        logits = model(input_ids=ids, use_cache=False).logits
        for hook in hooks:
            hook.remove()
        summed = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        wanted = [unit.prefix + name for unit, some in zip(trunk.units, names, strict=True) for name in some]
        for name, gradient in zip(wanted, torch.autograd.grad(summed, [outputs[one] for one in wanted]), strict=True):
            rows_TO = gradient.flatten(0, -2)
            expected[name] = expected.get(name, 0) + rows_TO.T @ rows_TO
    for index, unit in enumerate(trunk.units):
        assert sorted(found[index]) == names[index]
        for name, lower_OO in found[index].items():
            error = (whole(lower_OO) - expected[unit.prefix + name]).abs().max()
            assert error <= SUMMED * expected[unit.prefix + name].abs().max(), name


@pytest.mark.parametrize("layout", ["mixtral", "qwen3-moe", "gpt-oss", "llama4", "deepseek-v3"])
def test_of_one_token_they_follow_from_the_gradient_of_the_weights(layout: str) -> None:
    """Of two tokens only the first has a loss behind it, so dL/dW = g x' and (dL/dW)(dL/dW)' = |x|² g g'."""
    model = tiny.build(layout)
    trunk, names = trunk_of(model, [tiny.tokens(1, 2, seed=1)])
    experts = 0
    with torch.no_grad(), run_experts_one_by_one(model):
        found, gradients = dict(output_grams(trunk, names)), dict(loss_gradients(trunk, names))
    for index, unit in enumerate(trunk.units):
        for spec in unit.matrices:
            gradient = gradients[index][spec.parameter.removeprefix(unit.prefix)].mean_OI
            gradient = gradient if spec.index is None else gradient[spec.index]
            lower_OO = found[index].get(spec.name.removeprefix(unit.prefix))
            if lower_OO is None:
                assert not gradient.any()
                continue
            gradient_OI = gradient if lower_OO.shape[0] == gradient.shape[0] else gradient.T
            product_OO = gradient_OI @ gradient_OI.T
            product_OO /= product_OO.diagonal().sum().clamp_min(1e-30)
            share_OO = whole(lower_OO) / lower_OO.diagonal().sum().clamp_min(1e-30)
            assert float((product_OO - share_OO).abs().max()) <= 1e-4, spec.name
            experts += spec.index is not None
    assert experts


class Problem:
    """A matrix of 5 x 6, its two factors, and F = G ⊗ A / T in float64, damped as the method says."""

    def __init__(self, outputs: int = 5, inputs: int = 6, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        x_TI = draw(40, inputs) @ draw(inputs, inputs) * draw(inputs).exp()
        g_TO = draw(40, outputs) @ draw(outputs, outputs) * 0.01
        self.stats = Stats(inputs, frozenset({GRAM}))
        self.stats.update(x_TI)
        self.matrix = Matrix("m", draw(outputs, inputs), curvature_OO=g_TO.T @ g_TO)
        a_II, g_OO = self._damped(x_TI, 0.01), self._damped(g_TO, 0.1)
        self.g_OO, self.a_II = g_OO, a_II
        self.fisher_WW = np.kron(g_OO, a_II) / 40  # row-major weights: outputs first

    @staticmethod
    def _damped(x_TI: torch.Tensor, damping: float) -> np.ndarray:
        gram_II = (x_TI.double().T @ x_TI.double()).numpy()
        return gram_II + damping * np.diag(np.diag(gram_II))

    @property
    def weight_W(self) -> np.ndarray:
        return self.matrix.weight_OI.double().numpy().flatten()


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_the_whole_fisher_matrix(seed: int) -> None:
    problem = Problem(seed=seed)
    found_W = KFAC().by.of(problem.matrix, problem.stats).flatten().numpy()
    expected_W = problem.weight_W**2 / np.diag(np.linalg.inv(problem.fisher_WW)) / 2
    # two float32 inverses, of condition at most a few hundred
    np.testing.assert_allclose(found_W, expected_W, rtol=1e-3)


@pytest.mark.parametrize("budget", [Budget(0.2), Budget(0.5), Budget.of(None, Pattern(1, 2))])
def test_weights_are_the_closed_form_of_all_removals_at_once(budget: Budget) -> None:
    problem = Problem(seed=4)
    edit = KFAC(iterations=400).solve(problem.matrix, problem.stats, budget)
    gone_W = edit.pruned_OI.flatten().numpy()
    score_W = problem.weight_W**2 / np.diag(np.linalg.inv(problem.fisher_WW))
    if not budget.pattern.structured:
        assert set(np.flatnonzero(gone_W)) == set(np.argsort(score_W)[: gone_W.sum()])
    inverse_WW = np.linalg.inv(problem.fisher_WW)
    multiplier_P = np.linalg.solve(inverse_WW[np.ix_(gone_W, gone_W)], problem.weight_W[gone_W])
    change_W = edit.weight_OI.double().numpy().flatten() - problem.weight_W
    reached, best = change_W @ problem.fisher_WW @ change_W / 2, problem.weight_W[gone_W] @ multiplier_P / 2
    # conjugate gradients end when the gradient r, on unit diagonals, is 1e-5 of F w there; the loss is then r' F^-1 r / 2 high
    scale_W = np.sqrt(np.diag(problem.fisher_WW))
    unit_WW = problem.fisher_WW / np.outer(scale_W, scale_W)
    right_K = (unit_WW @ (scale_W * problem.weight_W))[~gone_W]
    slack = (TOLERANCE * np.linalg.norm(right_K)) ** 2 / np.linalg.eigvalsh(unit_WW[np.ix_(~gone_W, ~gone_W)])[0] / 2
    assert best * (1 - 1e-6) <= reached <= best * (1 + 1e-5) + slack
    assert slack < 0.1 * best


def test_with_outputs_that_count_alike_it_is_least_squares() -> None:
    problem = Problem(seed=2)
    pruned_OI = torch.rand(5, 6, generator=torch.Generator().manual_seed(5)) < 0.4
    system = problem.stats.scaled(0.01)
    alike = scaled(torch.eye(5), 1e-9)
    plain_OI = least_squares(problem.matrix.weight_OI, pruned_OI, system, steps=200)
    found_OI = least_squares(problem.matrix.weight_OI, pruned_OI, system, steps=400, outputs=alike)
    # both end where their gradients are 1e-4 of where they began
    assert float((found_OI - plain_OI).abs().max()) <= 5e-3 * float(plain_OI.abs().max())


@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, {"sparsity": 0.5, "steps": 3}, {"pattern": "2:4"}])
def test_llm_surgeon_prunes_a_checkpoint(settings: dict[str, Any], tmp_path: Path) -> None:
    common = {"method": "llm-surgeon", "calibration": tiny.tokens(2, 16)}
    model = tiny.save("llama", tmp_path / "model")
    report = llmprune.prune(model, out=tmp_path / "out", **common, **settings).report
    rows = report["tensors"]
    total = sum(row["shape"][0] * row["shape"][1] for row in rows)
    assert sum(row["achieved"] for row in rows) == total // 2
    shares = {row["achieved"] / (row["shape"][0] * row["shape"][1]) for row in rows}
    assert (len(shares) > 1) == ("pattern" not in settings)  # the whole model's weights compare
    assert report["verified"].startswith("reloaded")
    resident = llmprune.prune(tiny.build("llama"), **common, **settings).report["tensors"]
    assert [row["achieved"] for row in resident] == [row["achieved"] for row in rows]


def test_experts_without_tokens_get_the_budget_itself() -> None:
    settings = {"method": "llm-surgeon", "calibration": tiny.tokens(1, 3), "sparsity": 0.5}
    rows = llmprune.prune(tiny.build("qwen3-moe"), **settings).report["tensors"]
    unseen = [row for row in rows if row["tokens"] == 0]
    assert unseen and {row["achieved"] * 2 for row in unseen} == {row["shape"][0] * row["shape"][1] for row in unseen}


def test_units_cost_what_the_whole_fisher_matrix_says() -> None:
    """Group OBS on L'W, with G = L L', foresees the loss of taking all weights of some columns out at once."""
    problem = Problem(outputs=4, inputs=6, seed=7)
    weight_OI = problem.matrix.weight_OI.double()
    columns_UN = torch.arange(6).view(3, 2)
    inverse_WW = np.linalg.inv(np.kron(problem.g_OO, problem.a_II))
    losses = []
    for columns_N in columns_UN:
        gone_W = torch.zeros(4, 6, dtype=torch.bool)
        gone_W[:, columns_N] = True
        p = np.flatnonzero(gone_W.flatten().numpy())
        weight_P = problem.weight_W[p]
        losses.append(float(weight_P @ np.linalg.solve(inverse_WW[np.ix_(p, p)], weight_P)))
    turned_OI = torch.from_numpy(np.linalg.cholesky(problem.g_OO).T) @ weight_OI
    trace = eliminate(turned_OI, torch.from_numpy(problem.a_II), columns_UN, 1)
    assert trace.order == [int(np.argmin(losses))]
    assert trace.losses[0] == pytest.approx(min(losses), rel=1e-9)


def with_uneven_outputs() -> PreTrainedModel:
    """A model whose loss sees some directions of the hidden state much better than others."""
    model = tiny.build("llama")
    model.model.norm.weight.data.mul_((2 * torch.randn(32, generator=torch.Generator().manual_seed(3))).exp())
    model.model.layers[0].mlp.down_proj.weight.data[:, 1] *= 4  # by far the least otherwise
    return model


def test_the_structured_form_takes_the_channel_that_the_loss_misses_least() -> None:
    model = with_uneven_outputs()
    ids = torch.cat([tiny.tokens(1, 20, seed=seed) for seed in range(4)])
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    down = model.model.layers[0].mlp.down_proj
    down.register_forward_pre_hook(lambda _, args: inputs.__setitem__("x", args[0].detach().flatten(0, 1).double()))
    down.register_forward_hook(lambda _, __, out: outputs.__setitem__("y", out))
    logits = model(input_ids=ids, use_cache=False).logits
    summed = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    g_TO = torch.autograd.grad(summed, outputs["y"])[0].flatten(0, 1).double()
    a_II, g_OO = damped(inputs["x"].T @ inputs["x"], 0.01), damped(g_TO.T @ g_TO, 0.1)
    weight_OI = down.weight.detach().double()
    costs_I = (weight_OI * (g_OO @ weight_OI)).sum(0) / torch.linalg.inv(a_II).diagonal()
    plain_I = weight_OI.square().sum(0) / torch.linalg.inv(a_II).diagonal()
    assert int(costs_I.argmin()) != int(plain_I.argmin())  # the case tells the two apart
    settings: dict[str, Any] = {"width": {"units": ["channel"], "round_to": 1}, "ratio": 0.005}
    result = llmprune.prune(
        with_uneven_outputs(), method="llm-surgeon-structured", calibration=ids.tolist(), **settings
    ).report
    kept = result["structure"]["units"][0]["kept"]
    assert len(kept) < 48 and int(costs_I.argmin()) not in kept
