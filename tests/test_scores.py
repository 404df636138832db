"""Scores without a solver, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from draws import normal
from solver_problems import inputs_of, stats_of

from llmprune import scores
from llmprune.methods import method_of
from llmprune.methods.weight.scored import Scored
from llmprune.recipe import Recipe
from llmprune.types import Budget, Matrix, UserError

# --- scores ---


def test_ria_by_hand() -> None:
    weight_OI, stats = normal(6, 10), stats_of(inputs_of(10))
    size, norm_I = np.abs(weight_OI.double().numpy()), np.sqrt(stats.square_sums_I.double().numpy())
    expected = (size / size.sum(0) + size / size.sum(1)[:, None]) * np.sqrt(norm_I)
    np.testing.assert_allclose(scores.ria(Matrix("m", weight_OI), stats).numpy(), expected, rtol=1e-5)


def test_ria_of_empty_rows_and_columns_is_finite() -> None:
    weight_OI = normal(6, 10)
    weight_OI[2], weight_OI[:, 3] = 0, 0
    assert bool(torch.isfinite(scores.ria(Matrix("m", weight_OI), stats_of(inputs_of(10)))).all())


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.7])
def test_row_adaptive_wanda_is_one_share_for_all_rows(sparsity: float) -> None:
    weight_OI, stats = normal(12, 40) * normal(12, 1, seed=3).exp(), stats_of(inputs_of(40))
    budget = Budget(sparsity)
    pruned_OI = Scored("wanda-adaptive").solve(Matrix("m", weight_OI), stats, budget).pruned_OI
    assert int(pruned_OI.sum()) == budget.pruned_of(480)
    score = scores.wanda(Matrix("m", weight_OI), stats).double().numpy()
    # within a row a prefix of the ranking; across rows one alpha parts what went from the next that would go
    lost, after = [], []
    for row, gone in zip(score, pruned_OI.numpy(), strict=True):
        reached = np.cumsum(np.sort(row)) / row.sum()
        count = int(gone.sum())
        assert set(np.argsort(row)[:count]) == set(np.flatnonzero(gone))
        lost.append(reached[count - 1] if count else 0.0)
        after.append(reached[count])
    assert max(lost) <= min(after)


def test_random_depends_on_name_and_seed_alone() -> None:
    def mask(seed: int, name: str, weight_OI: torch.Tensor) -> torch.Tensor:
        method = method_of(Recipe(method="random", seed=seed))
        return method.solve(Matrix(name, weight_OI), None, Budget(0.5)).pruned_OI

    first = mask(0, "a", normal(8, 40))
    assert torch.equal(first, mask(0, "a", normal(8, 40, seed=1)))
    others = [mask(0, "b", normal(8, 40)), mask(1, "a", normal(8, 40))]
    # two independent masks agree on half of the 320 weights, give or take 9
    assert all(100 < int((first == other).sum()) < 220 for other in others)
    assert first.sum(1).tolist() == [20] * 8


def test_a_score_can_be_compared_within_rows_or_matrix() -> None:
    weight_OI = normal(8, 40) * normal(8, 1, seed=1).exp()
    by_row = Scored("magnitude", "row").solve(Matrix("m", weight_OI), None, Budget(0.5)).pruned_OI
    by_matrix = Scored("magnitude").solve(Matrix("m", weight_OI), None, Budget(0.5)).pruned_OI
    assert by_row.sum(1).tolist() == [20] * 8 and not torch.equal(by_row, by_matrix)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"score": "wandaa"}, "must be one of"), ({"group": "column"}, "group"), ({"bits": 4}, "no option 'bits'")],
)
def test_what_scored_refuses(options: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        method_of(Recipe(method="scored", options=options))
