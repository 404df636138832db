"""Group OBS and the folds, against dense algebra in float64."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import tiny
import torch
from width_problems import draw, error, mask, problem, setting

from llmprune.arch.units import CHANNEL
from llmprune.methods.width.choice import lowest
from llmprune.methods.width.k_prune import KPrune
from llmprune.solvers.groups import damped, eliminate, fold, joint_energy, mean_fold, unlike


@pytest.mark.parametrize("width", [1, 3])
def test_obs_ends_in_the_fold_and_its_scores_sum_to_the_error(width: int) -> None:
    weight_OI, x_TI = problem()
    columns_UN = torch.arange(12).view(-1, width)
    count = len(columns_UN) // 2
    trace = eliminate(weight_OI, x_TI.T @ x_TI, columns_UN, count)
    folded_OI = fold(weight_OI, x_TI.T @ x_TI, mask(trace.order, columns_UN))
    assert len(set(trace.order)) == count
    loss = error(x_TI, folded_OI - weight_OI)
    assert sum(trace.losses) == pytest.approx(loss, rel=1e-10)
    # one run holds every smaller amount
    shorter = eliminate(weight_OI, x_TI.T @ x_TI, columns_UN, count - 1)
    assert shorter.order == trace.order[:-1] and shorter.losses == pytest.approx(trace.losses[:-1], rel=1e-12)


def test_the_fold_is_least_squares_and_nystroem() -> None:
    weight_OI, x_TI = problem()
    gone_I = torch.zeros(12, dtype=torch.bool)
    gone_I[[1, 4, 5, 9]] = True
    kept_I = ~gone_I
    folded_OI = fold(weight_OI, x_TI.T @ x_TI, gone_I)
    best_KO = torch.linalg.lstsq(x_TI[:, kept_I], x_TI @ weight_OI.T).solution
    gram_II = x_TI.T @ x_TI
    nystroem_KI = torch.linalg.inv(gram_II[kept_I][:, kept_I]) @ gram_II[kept_I]
    assert not folded_OI[:, gone_I].any()
    for other_OK in (best_KO.T, weight_OI @ nystroem_KI.T):
        assert float((folded_OI[:, kept_I] - other_OK).abs().max()) <= 1e-12 * float(folded_OI.abs().max()) * 100


def test_one_step_of_obs_is_the_best_of_all() -> None:
    weight_OI, x_TI = problem()
    for width in (1, 3):
        columns_UN = torch.arange(12).view(-1, width)
        losses = [
            error(x_TI, fold(weight_OI, x_TI.T @ x_TI, mask([unit], columns_UN)) - weight_OI)
            for unit in range(len(columns_UN))
        ]
        trace = eliminate(weight_OI, x_TI.T @ x_TI, columns_UN, 1)
        assert trace.order == [losses.index(min(losses))]
        assert trace.losses[0] == pytest.approx(min(losses), rel=1e-10)


def test_strata_lose_equally_many() -> None:
    weight_OI, x_TI = problem()
    trace = eliminate(weight_OI * torch.arange(1, 13), x_TI.T @ x_TI, torch.arange(12)[:, None], 6, strata=3)
    assert [sum(unit // 4 == run for unit in trace.order) for run in range(3)] == [2, 2, 2]
    assert lowest(torch.tensor([3.0, 1, 2, 0, 5, 4]), 2, strata=2) == [1, 3]


def test_the_mean_fold_never_loses_to_zeros() -> None:
    weight_OI, x_TI = problem()
    gone_I = mask([2, 3, 7], torch.arange(12)[:, None])
    bias_O = mean_fold(weight_OI, x_TI.mean(0), gone_I)
    missing_TO = x_TI[:, gone_I] @ weight_OI[:, gone_I].T
    with_bias = float((missing_TO - bias_O).square().sum())
    assert float(bias_O.sub(missing_TO.mean(0)).abs().max()) <= 1e-13
    assert with_bias < float(missing_TO.square().sum())
    assert error(x_TI, fold(weight_OI, x_TI.T @ x_TI, gone_I) - weight_OI) < float(missing_TO.square().sum())


def test_dead_inputs_do_no_harm() -> None:
    weight_OI, x_TI = problem()
    x_TI[:, 3] = 0
    system_II = damped(x_TI.T @ x_TI, 0.0)
    trace = eliminate(weight_OI, system_II, torch.arange(12)[:, None], 2)
    folded_OI = fold(weight_OI, system_II, mask([3], torch.arange(12)[:, None]))
    assert bool(torch.isfinite(folded_OI).all()) and len(trace.order) == 2
    assert error(x_TI, folded_OI - weight_OI) <= 1e-20


def test_joint_energy_is_that_of_the_set() -> None:
    weight_OI, x_TI = problem()
    columns_UN = torch.arange(12).view(4, 3)
    energy_UU = joint_energy(weight_OI, x_TI.T @ x_TI, columns_UN)
    for pair in itertools.combinations(range(4), 2):
        gone_I = mask(list(pair), columns_UN)
        expected = error(x_TI[:, gone_I], weight_OI[:, gone_I])
        assert float(energy_UU[list(pair)][:, list(pair)].sum()) == pytest.approx(expected, rel=1e-12)


def test_copies_are_like_and_orthogonal_units_are_not() -> None:
    x_TI = torch.linalg.qr(draw(40, 12, seed=1)).Q * torch.arange(1, 13)
    columns_UN = torch.arange(12).view(4, 3)
    assert float((unlike(x_TI.T @ x_TI, columns_UN) - 1).abs().max()) <= 1e-12
    x_TI[:, 3:6] = -2 * x_TI[:, 0:3]
    assert unlike(x_TI.T @ x_TI, columns_UN).tolist() == pytest.approx([0, 0, 1, 1], abs=1e-12)
    _, mixed_TI = problem()
    cosine_II = (mixed_TI / mixed_TI.norm(dim=0)).T @ (mixed_TI / mixed_TI.norm(dim=0))
    expected = 1 - (cosine_II.abs() - torch.eye(12)).amax(1)
    found = unlike(mixed_TI.T @ mixed_TI, torch.arange(12)[:, None])
    assert float((found - expected).abs().max()) <= 1e-12


def test_k_prune_takes_what_neither_knows_nor_puts_out() -> None:
    """A channel that writes nothing is no loss to either measure."""
    model = tiny.build("llama")
    model.model.layers[1].mlp.down_proj.weight.data[:, 9] = 0
    trunk, asked = setting(model)
    counts = {place: int(place == (1, CHANNEL)) for place in asked.units}
    with torch.no_grad():
        found = KPrune().decide(trunk, replace(asked, spread=lambda scores: counts))
    assert found.removed[(1, CHANNEL)] == [9]
    assert float(found.scores[(1, CHANNEL)][9]) == 0 and float(found.scores[(1, CHANNEL)].sum()) == pytest.approx(2)
