"""oBERT and CHITA: gradient products against autograd, inverses against Woodbury's formula, masks against all masks."""

from __future__ import annotations

import shutil
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import oracles
import pytest
import tiny
import torch
from draws import normal
from torch.nn import functional as F

import llmprune
from llmprune import UserError
from llmprune.arch.discover import find_units
from llmprune.engine.gradient_store import Gradients
from llmprune.methods import make_method
from llmprune.solvers.block_fisher import BlockFisher
from llmprune.statistics import FISHER
from llmprune.types import FISHER_BLOCK, Budget, Gradient, Matrix, in_blocks
from llmprune.weights import Resident

DAMPING = 0.1
SAMPLES = [tiny.tokens(1, length, seed=length) for length in (9, 24, 17)]


def example(outputs: int, inputs: int, samples: int = 6, *, by_columns: bool = False) -> tuple[Matrix, torch.Tensor]:
    """A matrix with gradients, and those of each sample; correlated, so that blocks are not diagonal."""
    each = normal(samples, outputs, inputs, seed=1) + 0.7 * normal(samples, outputs, 1, seed=2)
    stored = each.mT if by_columns else each
    gradient = Gradient(*torch.zeros(2, *stored.shape[1:]))
    rows = in_blocks(gradient.mean_OI)
    gradient.blocks_RNBB = rows.new_zeros(*rows.shape, FISHER_BLOCK)
    for one in stored:
        gradient.add(one, 1 / samples)
    if by_columns:
        gradient.mean_OI, gradient.squares_OI, gradient.by_columns = gradient.mean_OI.T, gradient.squares_OI.T, True
    return Matrix("m", normal(outputs, inputs, seed=3), gradient), each


def fisher_of(each_NB: np.ndarray) -> np.ndarray:
    """Mean of the outer products plus damping, of one block."""
    return each_NB.T @ each_NB / len(each_NB)


def shift_of(each: torch.Tensor) -> float:
    return DAMPING * float(each.double().square().mean())


def woodbury(each_NB: np.ndarray, shift: float) -> np.ndarray:
    """The paper's recursion: one sample at a time into the inverse (Kurtic et al. 2022, eq. 6)."""
    inverse = np.eye(each_NB.shape[1]) / shift
    for g in each_NB:
        turned = inverse @ g
        inverse -= np.outer(turned, turned) / (len(each_NB) + g @ turned)
    return inverse


@pytest.mark.parametrize("by_columns", [False, True])
def test_saliency_and_weights_are_those_of_the_inverse_by_woodbury(by_columns: bool) -> None:
    matrix, each = example(40, 40, by_columns=by_columns)
    edit = make_method("obert", {"damping": DAMPING}).solve(matrix, None, Budget(0.5))
    assert matrix.gradient is not None
    fisher = BlockFisher.of(matrix.gradient, DAMPING)
    saliency_OI = fisher.restore(fisher.saliency(fisher.arrange(matrix.weight_OI)))
    for line in range(40):
        for block in (slice(0, 32), slice(32, 40)):
            place = (block, line) if by_columns else (line, block)
            inverse = woodbury(each[:, *place].double().numpy(), shift_of(each))
            weight = matrix.weight_OI[place].double().numpy()
            expected = weight**2 / (2 * np.diag(inverse))
            np.testing.assert_allclose(saliency_OI[place].numpy(), expected, rtol=1e-4)
            p = np.flatnonzero(edit.pruned_OI[place].numpy())
            best = weight - inverse[:, p] @ np.linalg.solve(inverse[np.ix_(p, p)], weight[p])
            np.testing.assert_allclose(edit.weight_OI[place].numpy(), best, atol=1e-4 * np.abs(weight).max())
    assert torch.equal(edit.pruned_OI, oracle_mask(saliency_OI, 800))


def oracle_mask(score_OI: torch.Tensor, count: int) -> torch.Tensor:
    return torch.from_numpy(oracles.lowest_of_rows(score_OI.reshape(1, -1).numpy(), count)).view_as(score_OI)


def rise(matrix: Matrix, each: torch.Tensor, weight_OI: torch.Tensor) -> float:
    """½ (v - w)' F (v - w) in float64, for rows of one block."""
    change = (weight_OI - matrix.weight_OI).double().numpy()
    rows = [fisher_of(each[:, row].double().numpy()) for row in range(len(change))]
    shift = shift_of(each)
    return sum(0.5 * float(one @ f @ one) + 0.5 * shift * float(one @ one) for one, f in zip(change, rows, strict=True))


def test_chita_never_ends_above_obert_nor_below_the_best_of_all_masks() -> None:
    matrix, each = example(2, 6)
    shift = shift_of(each)
    h = [fisher_of(each[:, row].double().numpy()) + shift * np.eye(6) for row in range(2)]
    w = matrix.weight_OI.double().numpy()

    def loss(gone: tuple[int, ...]) -> float:
        pruned = np.isin(np.arange(12), gone).reshape(2, 6)
        return sum(0.5 * oracles.obs(w[row], h[row], pruned[row])[1] for row in range(2))

    for count in (3, 6, 9):
        best = min(loss(gone) for gone in combinations(range(12), count))
        obert, chita = (
            rise(
                matrix, each, make_method(name, {"damping": DAMPING}).solve(matrix, None, Budget(count / 12)).weight_OI
            )
            for name in ("obert", "chita")
        )
        assert best * (1 - 1e-5) <= chita <= obert * (1 + 1e-5)


@pytest.mark.parametrize("sparsity", [0.6, 0.8])
def test_chita_lowers_what_obert_leaves(sparsity: float) -> None:
    matrix, each = example(24, 32)
    obert, chita = (
        rise(matrix, each, make_method(name, {"damping": DAMPING}).solve(matrix, None, Budget(sparsity)).weight_OI)
        for name in ("obert", "chita")
    )
    assert chita < obert


@pytest.mark.parametrize("layout", ["llama", "gpt2", "gpt-oss"])
def test_products_are_those_of_the_gradients_of_autograd(layout: str) -> None:
    model = tiny.build(layout)
    units = find_units(model, head=False)
    specs = [spec for spec in units[1].matrices if not spec.index]
    with torch.no_grad():
        batches = [{"input_ids": ids} for ids in SAMPLES]
        stored = Gradients(model, units, batches, Resident(model), specs, FISHER)
    model.requires_grad_(True)
    for spec in specs:
        parameter = model.get_parameter(spec.parameter)
        products: list[torch.Tensor] = []
        scale = 0.0
        for ids in SAMPLES:
            logits = model(input_ids=ids, use_cache=False).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            (gradient,) = torch.autograd.grad(loss, parameter)
            blocks = in_blocks(gradient if spec.index is None else gradient[spec.index])
            products.append(torch.einsum("rni,rnj->rnij", blocks, blocks))
            scale = max(scale, float(blocks.abs().max()) ** 2)
        found = stored.of(spec, torch.device("cpu"))
        assert found.blocks_RNBB is not None and found.by_columns == bool(spec.transposed)
        # two float32 passes in another order, each with rounding of the largest gradient
        assert float((found.blocks_RNBB - sum(products)).abs().max()) <= 1e-4 * scale, spec.name


@pytest.mark.parametrize("method", ["obert", "chita"])
def test_a_model_is_pruned_exactly(method: str) -> None:
    report = llmprune.prune(tiny.build("gpt2"), method=method, pattern="2:4", calibration=tiny.tokens(4, 16)).report
    assert all(row["achieved"] * 2 == row["shape"][0] * row["shape"][1] for row in report["tensors"])


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llama")
    asked = {"method": "obert", "sparsity": 0.5, "calibration": tiny.tokens(2, 8)}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(
        UserError, match=r"'obert' keeps 32 products of gradients a weight, 0\.0 GiB: .* has 0\.0 GiB free"
    ):
        llmprune.prune(model, **asked)
    monkeypatch.undo()
    monkeypatch.setattr("llmprune.engine.gradient_store.within_reach", lambda _: 1000)
    with pytest.raises(UserError, match=r"cpu has 0\.0 GiB free"):
        llmprune.prune(model, **asked)
