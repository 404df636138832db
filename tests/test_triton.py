"""Triton kernels in the interpreter, on odd shapes, beside NaN-filled scratch, against torch.

With TRITON_INTERPRET=0 the same on a GPU: `scripts/bench/gpu.py check`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import interpreter  # before the kernels
import pytest
import torch
import triton
import triton.language as tl
from patterns import two_of_four, unstructured

from llmprune.kernels import bitmask, dispatch, gram, gram_triton, moments, overflow, sparse24, sparsegpt_block, tuned
from llmprune.methods.weight.sparsegpt import SparseGPT
from llmprune.statistics import Stats
from llmprune.types import Budget, Matrix, Pattern

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, so that whatever a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_default_device(interpreter.DEVICE)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_blocks() -> Iterator[None]:
    """Configurations so small that every loop runs more than once and every mask has something to mask."""
    launches = {
        "matmul24": {"BLOCK_T": 16, "BLOCK_O": 16, "WORDS": 2, "SPLIT": 3},
        "unpack24": {"BLOCK_O": 8, "WORDS": 2},
        "add_surplus": {"BLOCK_T": 8, "BLOCK_S": 16},
        "matmul_bitmask": {"BLOCK_T": 16, "BLOCK_O": 16, "WORDS": 2, "SPLIT": 3},
        "gram_update": {"BLOCK_I": 16, "BLOCK_T": 16},
        "column_moments": {"BLOCK_T": 8, "BLOCK_I": 16, "STEPS": 2},
        "sparsegpt_block": {"BLOCK_O": 8},
    }
    with contextlib.ExitStack() as stack:
        for kernel, launch in launches.items():
            stack.enter_context(tuned.trial(kernel, launch))
        yield


def assert_product(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Within one rounding to the result's dtype, and float32 rounding of every sum."""
    exact = x.double() @ weight.double().T
    sums = x.shape[1] * torch.finfo(torch.float32).eps * (x.double().abs() @ weight.double().abs().T)
    assert found.dtype == x.dtype
    assert bool(((found.double() - exact).abs() <= exact.abs() * torch.finfo(x.dtype).eps + sums).all())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs"), [(1, 16, 64), (3, 37, 160), (16, 16, 192), (7, 5, 32), (13, 48, 352)]
)
def test_matmul24(small_blocks: None, tokens: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    weight, x = two_of_four(outputs, inputs, dtype), torch.randn(tokens, inputs).to(dtype)
    with dispatch.recorded() as ran, pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMPRUNE_KERNELS", "matmul24=triton")
        found = sparse24.matmul24(x, *sparse24.pack24(weight))
    assert ran["matmul24"]["ran"] == ["triton"]
    assert_product(found, x, weight)


@pytest.mark.parametrize("tokens", [1, 17, 64, 65])
def test_matmul24_as_shipped(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setenv("LLMPRUNE_KERNELS", "matmul24=triton")
    weight, x = two_of_four(70, 288, torch.bfloat16), torch.randn(tokens, 300).bfloat16()[:, :288]
    assert_product(sparse24.matmul24(x, *sparse24.pack24(weight)), x, weight)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 64), (37, 160), (1, 32)])
def test_unpack24(
    small_blocks: None, monkeypatch: pytest.MonkeyPatch, outputs: int, inputs: int, dtype: torch.dtype
) -> None:
    monkeypatch.setenv("LLMPRUNE_KERNELS", "unpack24=triton")
    weight = two_of_four(outputs, inputs, dtype)
    assert torch.equal(sparse24.unpack24(*sparse24.pack24(weight)), weight)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("sparsity", [0.5, 0.7])
@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(1, 16, 64), (3, 37, 150), (16, 5, 33), (9, 33, 340)])
def test_matmul_bitmask(
    small_blocks: None,
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    outputs: int,
    inputs: int,
    sparsity: float,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setenv("LLMPRUNE_KERNELS", "matmul_bitmask=triton")
    weight, x = unstructured(outputs, inputs, sparsity, dtype), torch.randn(tokens, inputs).to(dtype)
    assert_product(bitmask.matmul_bitmask(x, bitmask.pack_bitmask(weight)), x, weight)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(1, 16, 64), (8, 37, 160), (3, 5, 96)])
def test_matmul_overflow(
    small_blocks: None,
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    outputs: int,
    inputs: int,
    sparsity: float,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setenv("LLMPRUNE_KERNELS", "matmul_overflow=triton,matmul24=triton")
    weight, x = unstructured(outputs, inputs, sparsity, dtype), torch.randn(tokens, inputs).to(dtype)
    packed = overflow.pack_overflow(weight)
    found = overflow.matmul_overflow(x, packed)
    exact = x.double() @ weight.double().T
    base = x.double() @ sparse24.unpack24_torch(packed.values_OV, packed.metadata_OB).double().T
    sums = inputs * torch.finfo(torch.float32).eps * (x.double().abs() @ weight.double().abs().T)
    # the 2:4 part is rounded to the result's dtype before the surplus is added, and the sum once more
    bound = (base.abs() + exact.abs()) * torch.finfo(dtype).eps + 2 * sums
    assert bool(((found.double() - exact).abs() <= bound).all())


def test_matmul_bitmask_with_offsets_beyond_signed_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMPRUNE_KERNELS", "matmul_bitmask=triton")
    weight, x = torch.randn(2, 34000).half(), torch.randn(1, 34000).half()
    assert_product(bitmask.matmul_bitmask(x, bitmask.pack_bitmask(weight)), x, weight)


def assert_gram(lower: torch.Tensor, before: torch.Tensor, x: torch.Tensor) -> None:
    """The lower triangle within float32 rounding of T + 1 terms.

    On tensor cores a float32 is the sum of two TF32 to 2^-22 of it, and the product of the two lesser parts is left out: a
    product errs by three times that, six eps.
    """
    exact = (before.double() + x.double().T @ x.double()).tril()
    split = 6 if x.dtype == torch.float32 and not interpreter.INTERPRETED else 0
    bound = (
        (len(x) + 1 + split) * torch.finfo(torch.float32).eps * (before.abs() + x.double().abs().T @ x.double().abs())
    )
    assert bool(((lower.tril().double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize(("tokens", "width"), [(16, 16), (37, 50), (1, 33), (5, 7)])
def test_gram_update(
    small_blocks: None, monkeypatch: pytest.MonkeyPatch, tokens: int, width: int, dtype: torch.dtype
) -> None:
    monkeypatch.setenv("LLMPRUNE_KERNELS", "gram_update=triton")
    x = torch.randn(tokens, width).to(dtype)
    before = torch.randn(width, width)
    # above the diagonal nothing is defined, and nothing may leak from there
    lower = before.tril() + torch.full_like(before, float("nan")).triu(1)
    assert_gram(gram.gram_update_(lower, x), before.tril(), x)


def test_gram_updates_of_several_inputs_in_one_launch(small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMPRUNE_KERNELS", "gram_update=triton")
    wide = torch.randn(40, 60).half()
    # among them a slice with gaps, one that begins off the alignment, and an expert that saw no token
    inputs = [torch.randn(9, 20).half(), wide[:, 30:50], wide.flatten()[1:401].view(20, 20), torch.empty(0, 20).half()]
    lowers = [torch.zeros(20, 20) for _ in inputs]
    again, narrow = torch.randn(5, 20).half(), torch.randn(5, 7).half()
    of_narrow = torch.zeros(7, 7)
    launches: list[int] = []
    launch = dispatch.run
    monkeypatch.setattr(dispatch, "run", lambda *operands: (launches.append(len(operands) // 2), launch(*operands)))
    # one Gram matrix twice, which two programs must not write at once, and one of another width
    gram.gram_updates_([*zip(lowers, inputs, strict=True), (of_narrow, narrow), (lowers[0], again)])
    assert launches == [4, 1, 1]
    for lower, x in zip(lowers, (torch.cat([inputs[0], again]), *inputs[1:]), strict=True):
        assert_gram(lower, torch.zeros(20, 20), x)
    assert_gram(of_narrow, torch.zeros(7, 7), narrow)


def test_tiles_of_a_triangle() -> None:
    @triton.jit
    def kernel(out_ptr):  # type: ignore[no-untyped-def]
        row, column = gram_triton.lower_tile(tl.program_id(0))
        tl.store(out_ptr + 2 * tl.program_id(0), row)
        tl.store(out_ptr + 2 * tl.program_id(0) + 1, column)

    out = torch.zeros(210, 2, dtype=torch.int32)
    kernel[(210,)](out)
    assert out.tolist() == [[row, column] for row in range(20) for column in range(row + 1)]


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize(("tokens", "width"), [(16, 16), (41, 37), (1, 5), (32, 20), (17, 1)])
def test_column_moments(
    small_blocks: None, monkeypatch: pytest.MonkeyPatch, tokens: int, width: int, dtype: torch.dtype
) -> None:
    monkeypatch.setenv("LLMPRUNE_KERNELS", "column_moments=triton")
    # a mean of a hundred spreads, which E[x^2] - E[x]^2 would lose; in half precision squares overflow
    x = (torch.randn(2 * tokens, width) * 3 + 300).to(dtype)
    found = moments.Moments(width, interpreter.DEVICE)
    found.update(x[:tokens])
    found.update(x[tokens:])
    exact = x.double()
    eps = 4 * (2 * tokens + 4) * torch.finfo(torch.float32).eps
    torch.testing.assert_close(found.mean_I.double(), exact.mean(0), rtol=eps, atol=0)
    torch.testing.assert_close(found.square_sums_I.double(), exact.square().sum(0), rtol=eps, atol=0)
    # of the mean's rounding, the variance sees the square, and twice its product with the summed deviations
    spread = exact.std(0, correction=0)
    slack = eps * spread.square() + (eps * 300).__pow__(2) + eps * 300 * spread * torch.finfo(torch.float32).eps
    assert bool(((found.variance_I.double() - spread.square()).abs() <= slack).all())


BUDGETS = [Budget(0.5), Budget(0.3), *(Budget.of(None, Pattern(*pair)) for pair in ((2, 4), (1, 4), (4, 8), (1, 2)))]


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda one: str(one.pattern) if one.pattern.structured else "any")
@pytest.mark.parametrize(("columns", "outputs"), [(16, 8), (24, 13), (8, 1), (40, 21)])
def test_sparsegpt_block(
    small_blocks: None, monkeypatch: pytest.MonkeyPatch, columns: int, outputs: int, budget: Budget
) -> None:
    torch.manual_seed(columns)
    current = torch.randn(columns, outputs)
    x = torch.randn(3 * columns, columns).cumsum(0)
    inverse_t = torch.linalg.cholesky(torch.linalg.inv((x.T @ x / len(x)).double())).float()
    # only the lower triangle of the factor may be read
    inverse_t = inverse_t.tril() + torch.full_like(inverse_t, float("nan")).triu(1)
    expected, wanted = current.clone(), torch.zeros(columns, outputs, dtype=torch.bool)
    loss = sparsegpt_block.solve_block(expected, inverse_t.tril(), wanted, budget)
    monkeypatch.setenv("LLMPRUNE_KERNELS", "sparsegpt_block=triton")
    # as the caller has them: rows of a larger mask
    whole = torch.zeros(columns + 3, outputs, dtype=torch.bool)
    pruned = whole[2 : columns + 2]
    found = sparsegpt_block.solve_block(current, inverse_t, pruned, budget)
    assert torch.equal(pruned, wanted) and not whole[:2].any() and not whole[-1].any()
    assert bool((current[pruned] == 0).all())
    torch.testing.assert_close(current, expected, rtol=1e-4, atol=1e-4 * float(expected.square().mean().sqrt()))
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)


def test_sparsegpt_through_the_kernel(small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole matrix: blocks, a ragged last one, and what is carried between them."""
    weight = torch.randn(11, 40)
    stats = Stats(40, SparseGPT.needs, interpreter.DEVICE)
    stats.update(torch.randn(90, 40) + torch.randn(90, 1))
    for budget in BUDGETS[:3]:
        expected = SparseGPT(block=16).solve(Matrix("weight", weight), stats, budget)
        with monkeypatch.context() as patch:
            patch.setenv("LLMPRUNE_KERNELS", "sparsegpt_block=triton")
            found = SparseGPT(block=16).solve(Matrix("weight", weight), stats, budget)
        assert torch.equal(found.pruned_OI, expected.pruned_OI)
        torch.testing.assert_close(found.weight_OI, expected.weight_OI, rtol=1e-4, atol=1e-5)
        assert found.loss == pytest.approx(expected.loss, rel=1e-4)


def test_results_repeat_to_the_bit(small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sum has one order: nothing depends on which program is first. Only a GPU can show otherwise."""
    x, weight = torch.randn(16, 192).half(), two_of_four(48, 192, torch.float16)
    packed, masked = sparse24.pack24(weight), bitmask.pack_bitmask(weight)
    monkeypatch.setenv("LLMPRUNE_KERNELS", "triton")
    for call in (
        lambda: gram.gram_update_(torch.zeros(192, 192), x),
        lambda: torch.stack(dispatch.run("column_moments", x)),
        lambda: sparse24.matmul24(x, *packed),
        lambda: bitmask.matmul_bitmask(x, masked),
    ):
        assert torch.equal(call(), call())


def test_what_the_kernel_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMPRUNE_KERNELS", "matmul24=triton")
    for x, weight, reason in (
        (torch.randn(0, 32).bfloat16(), two_of_four(4, 32, torch.bfloat16), "there are no tokens"),
        (torch.randn(2, 32), two_of_four(4, 32), "not torch.float32"),
        (torch.randn(2, 16).half(), two_of_four(4, 16, torch.float16), "16 inputs are no multiple of 32"),
        (torch.randn(2, 32).half(), two_of_four(4, 32, torch.bfloat16), "inputs of torch.float16 and weights of"),
    ):
        with pytest.raises(Exception, match=reason):
            sparse24.matmul24(x, *sparse24.pack24(weight))


def test_configurations_cover_every_size() -> None:
    device = torch.device("cpu")
    for tokens in (1, 16, 17, 33, 64):
        for outputs in (1, 8192, 8193, 1 << 20):
            launch = tuned.configuration("matmul24", device, tokens=tokens, outputs=outputs)
            assert launch["BLOCK_T"] >= tokens
