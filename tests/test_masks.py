"""Selection: exact counts, ties to the lowest index, valid N:M groups."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pytest
import torch
from draws import normal
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune import masks
from llmprune.types import Budget, Pattern

quick = settings(max_examples=60, deadline=None, database=None, derandomize=True)

SHAPES = [(1, 1), (1, 7), (5, 1), (3, 5), (17, 63), (8, 128), (4, 500)]
SPARSITIES = [0.0, 1e-9, 0.1, 1 / 3, 0.5, 0.65, 0.7, 0.9, 0.999999]
PATTERNS = [(1, 4), (2, 4), (4, 8), (3, 5), (1, 2), (7, 8), (1, 1), (4, 4)]


@st.composite
def tied_scores(draw: st.DrawFn, columns: st.SearchStrategy[int] | None = None) -> torch.Tensor:
    """Score matrices of few distinct values, infinities and both zeros among them: mostly ties."""
    rows, width = draw(st.integers(1, 6)), draw(st.integers(1, 24) if columns is None else columns)
    value = st.sampled_from([-math.inf, -1.5, -0.0, 0.0, 1e-30, 1.0, 3.0, math.inf])
    flat = draw(st.lists(value, min_size=rows * width, max_size=rows * width))
    return torch.tensor(flat).reshape(rows, width)


# --- counts ---


@pytest.mark.parametrize(
    ("sparsity", "count", "pruned"),
    [
        (0.0, 10, 0),
        (0.5, 0, 0),
        (0.5, 1, 1),
        (0.5, 3, 2),
        (0.25, 2, 1),
        (0.25, 6, 2),
        (0.3, 10, 3),
        (0.7, 10, 7),
        (0.7, 64 * 44, 1971),
        (0.99, 10, 10),
        (0.49, 1, 0),
    ],
)
def test_pruned_count_rounds_half_up(sparsity: float, count: int, pruned: int) -> None:
    assert Budget(sparsity).pruned_of(count) == pruned


@quick
@given(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True), st.integers(0, 10**9))
def test_pruned_count_is_nearest_and_monotone(one: float, other: float, count: int) -> None:
    low, high = sorted((one, other))
    fewer, more = Budget(low).pruned_of(count), Budget(high).pruned_of(count)
    assert 0 <= fewer <= more <= count
    # the product sparsity * count and the sum with 0.5 are each rounded once, to 53 bits
    assert abs(fewer - low * count) <= 0.5 + 2 * count * 2**-53


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_exact_counts_per_row_and_per_matrix(shape: tuple[int, int], sparsity: float) -> None:
    scores_OI = normal(*shape).abs()
    by_row_OI = masks.select(scores_OI, Budget(sparsity), by="row")
    by_matrix_OI = masks.select(scores_OI, Budget(sparsity), by="matrix")
    assert by_row_OI.dtype == by_matrix_OI.dtype == torch.bool
    assert by_row_OI.shape == by_matrix_OI.shape == shape
    assert by_row_OI.sum(1).tolist() == [math.floor(sparsity * shape[1] + 0.5)] * shape[0]
    assert int(by_matrix_OI.sum()) == math.floor(sparsity * (shape[0] * shape[1]) + 0.5)


@quick
@given(tied_scores(), st.data())
def test_exact_count_whatever_the_ties(scores_GN: torch.Tensor, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, scores_GN.shape[1]))
    assert masks.lowest(scores_GN, count).sum(1).tolist() == [count] * len(scores_GN)


# --- which ones ---


@quick
@given(tied_scores(), st.data())
def test_lowest_is_the_stable_sort(scores_GN: torch.Tensor, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, scores_GN.shape[1]))
    expected_GN = oracles.lowest_of_rows(scores_GN.numpy(), count)
    np.testing.assert_array_equal(masks.lowest(scores_GN, count).numpy(), expected_GN)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [0, 1, 32, 62, 63])
def test_every_dtype_selects_alike(dtype: torch.dtype, count: int) -> None:
    # rounding to 1/4 makes ties in every row and is exact in every dtype
    scores_GN = (normal(9, 63) * 4).round() / 4
    expected_GN = oracles.lowest_of_rows(scores_GN.numpy(), count)
    np.testing.assert_array_equal(masks.lowest(scores_GN.to(dtype), count).numpy(), expected_GN)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.7])
def test_scores_in_any_memory_layout(sparsity: float) -> None:
    scores_IO = normal(40, 24).abs()
    for by in ("row", "matrix"):
        of_view_OI = masks.select(scores_IO.T, Budget(sparsity), by=by)
        of_copy_OI = masks.select(scores_IO.T.contiguous(), Budget(sparsity), by=by)
        assert torch.equal(of_view_OI, of_copy_OI)


def test_ties_go_to_the_lowest_row_major_index() -> None:
    scores_OI = torch.ones(3, 4)
    scores_OI[2, 3] = 0
    pruned_OI = masks.select(scores_OI, Budget(0.5), by="matrix")
    assert pruned_OI.flatten().nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 11]
    assert masks.select(torch.zeros(2, 6), Budget(0.5), by="row").tolist() == [[True] * 3 + [False] * 3] * 2


def test_scores_are_left_as_they_are() -> None:
    scores_OI = normal(8, 40)
    before_OI = scores_OI.clone()
    masks.select(scores_OI, Budget(0.5), by="row")
    masks.select(scores_OI, Budget(0.5), by="matrix")
    masks.select(scores_OI, Budget.of(None, Pattern(2, 4)), by="row")
    assert torch.equal(scores_OI, before_OI)


# --- N:M ---


@pytest.mark.parametrize(("keep", "group"), PATTERNS)
@pytest.mark.parametrize("groups", [1, 3, 25])
def test_every_group_keeps_exactly_n(keep: int, group: int, groups: int) -> None:
    budget = Budget.of(None, Pattern(keep, group))
    scores_OI = normal(11, groups * group).abs()
    pruned_OI = masks.select(scores_OI, budget, by="row")
    kept_OG = (~pruned_OI).reshape(11, groups, group).sum(2)
    assert bool((kept_OG == keep).all())
    assert int(pruned_OI.sum()) == budget.pruned_of(scores_OI.numel())
    # nothing that was pruned has a higher score than anything kept beside it
    grouped_OGM, pruned_OGM = scores_OI.reshape(11, groups, group), pruned_OI.reshape(11, groups, group)
    highest_pruned_OG = grouped_OGM.masked_fill(~pruned_OGM, -math.inf).amax(2)
    lowest_kept_OG = grouped_OGM.masked_fill(pruned_OGM, math.inf).amin(2)
    assert bool((highest_pruned_OG <= lowest_kept_OG).all())


@quick
@given(st.sampled_from(PATTERNS), st.data())
def test_groups_are_stably_sorted(pattern: tuple[int, int], data: st.DataObject) -> None:
    keep, group = pattern
    scores_OI = data.draw(tied_scores(st.integers(1, 4).map(lambda groups: groups * group)))
    expected_OI = oracles.lowest_of_groups(scores_OI.numpy(), keep, group)
    np.testing.assert_array_equal(masks.lowest_per_group(scores_OI, keep, group).numpy(), expected_OI)


def test_ties_in_a_group_go_to_the_lowest_index() -> None:
    assert masks.lowest_per_group(torch.ones(1, 8), 2, 4).tolist() == [[True, True, False, False] * 2]
    assert masks.lowest_per_group(torch.ones(1, 8), 1, 4).tolist() == [[True, True, True, False] * 2]


def test_the_scope_does_not_matter_for_a_pattern() -> None:
    scores_OI, budget = normal(6, 40), Budget.of(None, Pattern(3, 5))
    assert torch.equal(masks.select(scores_OI, budget, by="row"), masks.select(scores_OI, budget, by="matrix"))


def test_width_that_no_group_divides_is_refused() -> None:
    with pytest.raises(RuntimeError):
        masks.lowest_per_group(torch.ones(2, 10), 2, 4)


# --- idempotence ---


@pytest.mark.parametrize("by", ["row", "matrix"])
@pytest.mark.parametrize("budget", [Budget(0.3), Budget(0.5), Budget(0.7), Budget.of(None, Pattern(2, 4))], ids=str)
def test_selecting_again_after_zeroing_changes_nothing(budget: Budget, by: str) -> None:
    scores_OI = normal(13, 60).abs() + 1e-3
    once_OI = masks.select(scores_OI, budget, by=by)
    twice_OI = masks.select(scores_OI.masked_fill(once_OI, 0), budget, by=by)
    assert torch.equal(once_OI, twice_OI)


@pytest.mark.parametrize("by", ["row", "matrix"])
def test_more_sparsity_only_adds(by: str) -> None:
    scores_OI = (normal(13, 60) * 4).round()
    previous_OI = torch.zeros(13, 60, dtype=torch.bool)
    for sparsity in SPARSITIES:
        pruned_OI = masks.select(scores_OI, Budget(sparsity), by=by)
        assert not bool((previous_OI & ~pruned_OI).any())
        previous_OI = pruned_OI
