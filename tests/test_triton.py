"""Triton kernels in the interpreter, on odd shapes, beside NaN-filled scratch, against torch."""

from __future__ import annotations

from collections.abc import Iterator

import interpreter  # noqa: F401 (before the kernels)
import pytest
import torch
from patterns import two_of_four

from llmprune.kernels import dispatch, sparse24, tuned

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, so that whatever a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Configurations so small that every loop runs more than once and every mask has something to mask."""
    launches = {
        "matmul24": {"BLOCK_T": 16, "BLOCK_O": 16, "WORDS": 2, "SPLIT": 3},
        "unpack24": {"BLOCK_O": 8, "WORDS": 2},
    }
    for module in ("sparse24_triton",):
        monkeypatch.setattr(f"llmprune.kernels.{module}.configuration", lambda kernel, device, **_: launches[kernel])


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


@pytest.mark.parametrize("tokens", [1, 17, 64])
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


def test_what_the_kernel_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMPRUNE_KERNELS", "matmul24=triton")
    for x, weight, reason in (
        (torch.randn(65, 32).bfloat16(), two_of_four(4, 32, torch.bfloat16), "65 tokens are not 1 to 64"),
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
    assert not tuned.is_tuned(device)
