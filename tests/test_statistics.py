"""Streaming statistics against float64, with tolerances from the rules of rounding.

U is the unit roundoff of float32. A sum of n terms, each rounded once, errs by at most
n * U * (sum of absolute values), in any order of summation and to first order in U.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from draws import normal

from llmprune.kernels.gram import ROWS, gram_update_
from llmprune.statistics import GRAM, KINDS, MOMENTS, Stats, Tokens, update_together

U = 2.0**-24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def gathered(x_TI: torch.Tensor, *kinds: str, sizes: list[int] | None = None) -> Stats:
    stats = Stats(x_TI.shape[1], frozenset(kinds or KINDS))
    for chunk_TI in x_TI.split(sizes or [len(x_TI)]):
        stats.update(chunk_TI)
    return stats


def float64(x: torch.Tensor) -> np.ndarray:
    return x.double().numpy()


# --- Gram ---


def assert_gram(stats: Stats, x_TI: torch.Tensor) -> None:
    """|G - X'X| <= (T + 1) U |X|'|X|: products of the inputs as given, summed in float32."""
    x = float64(x_TI)
    bound_II = (len(x) + 1) * U * (np.abs(x).T @ np.abs(x))
    gram_II = stats.gram_II
    assert gram_II.dtype == torch.float32
    assert np.all(np.abs(float64(gram_II) - x.T @ x) <= bound_II)
    assert torch.equal(gram_II, gram_II.T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 63, 500])
@pytest.mark.parametrize("tokens", [1, 63, 500])
def test_gram_of_odd_sizes(tokens: int, width: int, dtype: torch.dtype) -> None:
    x_TI = normal(tokens, width, dtype=dtype)
    assert_gram(gathered(x_TI, GRAM), x_TI)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_of_correlated_inputs_keeps_half_precision_products_exact(dtype: torch.dtype) -> None:
    # All products positive: the bound is then relative, and summing in half precision would break it.
    x_TI = (normal(500, 33).abs() + 1).to(dtype)
    gram_II, expected_II = float64(gathered(x_TI, GRAM).gram_II), float64(x_TI).T @ float64(x_TI)
    assert np.max(np.abs(gram_II / expected_II - 1)) <= 501 * U


def test_more_rows_than_are_cast_at_once() -> None:
    x_TI = normal(ROWS + 5, 5, dtype=torch.bfloat16)
    stats = gathered(x_TI)
    assert_gram(stats, x_TI)
    np.testing.assert_allclose(stats.mean_I.numpy(), float64(x_TI).mean(0), rtol=0, atol=1e-6)
    np.testing.assert_allclose(stats.variance_I.numpy(), float64(x_TI).var(0), rtol=1e-5)
    assert stats.tokens == ROWS + 5


@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_in_chunks_equals_one_update(dtype: torch.dtype) -> None:
    x_TI = normal(500, 63, dtype=dtype)
    chunked = gathered(x_TI, GRAM, sizes=[1, 63, 0, 128, 307, 1])
    assert_gram(chunked, x_TI)
    x = float64(x_TI)
    apart_II = np.abs(float64(chunked.gram_II) - float64(gathered(x_TI, GRAM).gram_II))
    assert np.all(apart_II <= 2 * 501 * U * (np.abs(x).T @ np.abs(x)))
    assert chunked.tokens == 500


def test_only_the_lower_triangle_is_read() -> None:
    x_TI = normal(40, 63)
    stats = gathered(x_TI, GRAM)
    clean_II = stats.gram_II
    stats.gram_lower_II[torch.triu(torch.ones(63, 63, dtype=torch.bool), 1)] = float("nan")
    assert torch.equal(stats.gram_II, clean_II)


def test_gram_kernel_adds_to_what_is_there() -> None:
    x_TI = (normal(30, 17) * 4).round()  # small integers: every sum is exact in float32
    lower_II = torch.full((17, 17), 3.0)
    assert gram_update_(lower_II, x_TI) is lower_II
    expected_II = torch.from_numpy(float64(x_TI).T @ float64(x_TI) + 3).float()
    assert torch.equal(lower_II.tril(), expected_II.tril())


def test_gram_is_a_fresh_tensor() -> None:
    stats = gathered(normal(9, 5), GRAM)
    stats.gram_II.zero_()
    assert float(stats.gram_II.diagonal().min()) > 0


# --- moments ---


def assert_moments(stats: Stats, x_TI: torch.Tensor) -> None:
    """Sums of T terms: relative (T + 4) U for squares, (T + 4) U mean|x| for the mean.

    A deviation from a mean that errs by d makes the variance err by at most d^2 + 2 d std, plus the
    rounding of each x - mean (U |x - mean|, so 2 U of its square) and of the sum.
    """
    x, n = float64(x_TI), len(x_TI)
    off_I = (n + 4) * U * np.abs(x).mean(0)
    assert np.all(np.abs(float64(stats.square_sums_I) - (x**2).sum(0)) <= (n + 4) * U * (x**2).sum(0))
    assert np.all(np.abs(float64(stats.mean_I) - x.mean(0)) <= off_I)
    variance_I, std_I = x.var(0), x.std(0)
    bound_I = (n + 8) * U * variance_I + off_I**2 + 2 * off_I * std_I
    assert np.all(np.abs(float64(stats.variance_I) - variance_I) <= bound_I)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 63, 500])
@pytest.mark.parametrize("tokens", [1, 2, 63, 500])
def test_moments_of_odd_sizes(tokens: int, width: int, dtype: torch.dtype) -> None:
    x_TI = normal(tokens, width, dtype=dtype)
    assert_moments(gathered(x_TI, MOMENTS), x_TI)


@pytest.mark.parametrize("sizes", [[500], [1, 63, 0, 128, 307, 1], [1] * 500], ids=["whole", "ragged", "single"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_in_chunks(sizes: list[int], dtype: torch.dtype) -> None:
    x_TI = normal(500, 63, dtype=dtype)
    stats = gathered(x_TI, MOMENTS, sizes=sizes)
    assert_moments(stats, x_TI)
    assert stats.tokens == 500


@pytest.mark.parametrize("sizes", [[500], [100] * 5, [1] * 500], ids=["whole", "hundreds", "single"])
@pytest.mark.parametrize("mean", [0.0, 30.0, -1000.0, 1e4])
def test_variance_survives_a_large_mean(mean: float, sizes: list[int]) -> None:
    # E[x^2] - E[x]^2 in float32 would err by about U * mean^2: 6e-2 at 1000, 6 at 10000.
    x_TI = (normal(500, 9) + mean).float()
    stats = gathered(x_TI, MOMENTS, sizes=sizes)
    x = float64(x_TI)
    # float32 means are sums by pairs, log2(500) deep, then merged: a few ulps of the mean, not 500
    off = 16 * U * max(abs(mean), 1)
    assert np.max(np.abs(float64(stats.mean_I) - x.mean(0))) <= off
    assert np.max(np.abs(float64(stats.variance_I) - x.var(0))) <= 2 * off * x.std() + 508 * U * x.var()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_that_overflow_half_precision(dtype: torch.dtype) -> None:
    # 1000^2 = 1e6 is beyond float16 (65504). Sums of up to 16 of them are exact in float32.
    x_TI = torch.full((16, 3), 1000.0, dtype=dtype)
    x_TI[::2, 1] = -1000
    x_TI[:, 2] = 0
    stats = gathered(x_TI)
    assert stats.gram_II.tolist() == [[16e6, 0, 0], [0, 16e6, 0], [0, 0, 0]]
    np.testing.assert_allclose(stats.square_sums_I.numpy(), [16e6, 16e6, 0], rtol=4 * U)
    assert stats.mean_I.tolist() == [1000, 0, 0]
    assert stats.variance_I.tolist() == [0, 1e6, 0]


def test_largest_float16_values() -> None:
    x_TI = torch.full((500, 63), 65504.0, dtype=torch.float16)
    stats = gathered(x_TI)
    assert_gram(stats, x_TI)
    assert_moments(stats, x_TI)


def test_constant_columns_have_no_variance() -> None:
    stats = gathered(torch.full((64, 2), 0.1), MOMENTS, sizes=[32, 32])
    assert float(stats.variance_I.max()) <= (4 * U * 0.1) ** 2


def test_square_sums_are_the_gram_diagonal() -> None:
    x_TI = normal(500, 63)
    from_gram_I, from_moments_I = gathered(x_TI, GRAM).square_sums_I, gathered(x_TI, MOMENTS).square_sums_I
    np.testing.assert_allclose(from_gram_I.numpy(), from_moments_I.numpy(), rtol=2 * 504 * U)


def test_no_tokens_yet() -> None:
    stats = Stats(4, KINDS)
    assert stats.tokens == 0
    for values in (stats.gram_II, stats.square_sums_I, stats.mean_I, stats.variance_I):
        assert float(values.abs().max()) == 0
    stats.update(torch.empty(0, 4))
    assert stats.tokens == 0 and bool(torch.isfinite(stats.variance_I).all())


def test_inputs_are_left_as_they_are() -> None:
    x_TI = normal(50, 9)
    before_TI = x_TI.clone()
    gathered(x_TI)
    assert torch.equal(x_TI, before_TI)


# --- the object ---


def test_unknown_kind_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="kurtosis"):
        Stats(4, frozenset({GRAM, "kurtosis"}))


def test_what_was_not_gathered_is_refused() -> None:
    only_moments, only_gram = Stats(4, frozenset({MOMENTS})), Stats(4, frozenset({GRAM}))
    assert only_gram.has_gram and not only_moments.has_gram
    with pytest.raises(ValueError, match="Gram"):
        _ = only_moments.gram_II
    with pytest.raises(ValueError, match="moments"):
        _ = only_gram.mean_I
    with pytest.raises(ValueError, match="moments"):
        _ = only_gram.variance_I


def test_derived_values_are_shared_until_tokens_are_added() -> None:
    stats = Stats(4, frozenset({GRAM}))
    stats.update(normal(8, 4))
    made: list[float] = []

    def trace() -> float:
        made.append(float(stats.gram_II.diagonal().sum()))
        return made[-1]

    first = stats.derived("trace", trace)
    assert stats.derived("trace", trace) == first and len(made) == 1
    assert stats.derived(("trace", 2), lambda: -1.0) == -1.0 and len(made) == 1
    stats.update(normal(8, 4, seed=1))
    assert stats.derived("trace", trace) > first and len(made) == 2


def test_updates_together_are_those_one_by_one() -> None:
    """Of several widths and dtypes, with and without a Gram matrix, one of them twice."""
    kinds = [KINDS, frozenset({GRAM}), frozenset({MOMENTS}), frozenset({GRAM})]
    together, alone = ([Stats(width, one) for width, one in zip((4, 4, 9, 9), kinds, strict=True)] for _ in range(2))
    inputs = [normal(20, 4), normal(7, 4, seed=1).half(), normal(5, 9, seed=2), normal(0, 9), normal(3, 4, seed=3)]
    places = [0, 1, 2, 3, 0]
    update_together(Tokens(together[place], x_TI) for place, x_TI in zip(places, inputs, strict=True))
    for place, x_TI in zip(places, inputs, strict=True):
        alone[place].update(x_TI)
    for one, other in zip(together, alone, strict=True):
        assert one.tokens == other.tokens
        assert all(torch.equal(mine, its) for mine, its in zip(one.tensors(), other.tensors(), strict=True))
