"""Matrices kept as 2:4 and a surplus, against the dense ones they stand for."""

from __future__ import annotations

import pytest
import torch
from patterns import unstructured

from llmprune.kernels import overflow


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 4), (5, 36), (9, 200)])
def test_packing_is_exact(outputs: int, inputs: int, sparsity: float, dtype: torch.dtype) -> None:
    weight = unstructured(outputs, inputs, sparsity, dtype)
    packed = overflow.pack_overflow(weight)
    assert torch.equal(overflow.unpack_overflow(packed), weight)
    assert torch.equal(overflow.unpack_overflow(packed, slice(0, 1)), weight[:1])
    kept = weight.unflatten(1, (-1, 4)).count_nonzero(-1)
    assert len(packed.extra_S) == int((kept - 2).clamp(min=0).sum())


def test_layout_is_the_documented_one() -> None:
    weight = torch.tensor([[1.0, -4, 2, 3, 0, 7, 5, 0], [6, 7, 0, 0, 9, 8, -7.5, 0]])
    packed = overflow.pack_overflow(weight)
    assert packed.values_OV.tolist() == [[-4, 3, 7, 5], [6, 7, 9, 8]]
    assert packed.extra_S.tolist() == [1, 2, -7.5]
    assert packed.columns_S.tolist() == [0, 2, 6]
    assert packed.starts_O1.tolist() == [0, 2, 3]


def test_columns_use_all_sixteen_bits() -> None:
    weight = torch.ones(1, 1 << 16, dtype=torch.float16)
    assert torch.equal(overflow.unpack_overflow(overflow.pack_overflow(weight)), weight)
    with pytest.raises(ValueError, match="65540 inputs"):
        overflow.pack_overflow(torch.ones(1, (1 << 16) + 4))
    with pytest.raises(ValueError, match="6 inputs are no multiple of 4"):
        overflow.pack_overflow(torch.ones(1, 6))


def test_memory_beside_dense() -> None:
    # every mask of four weights once: half of the weights are kept, and 6 of 64 do not fit
    weight = torch.tensor([[float(code >> bit & 1) for code in range(16) for bit in range(4)]]).bfloat16()
    packed = overflow.pack_overflow(weight)
    assert packed.bytes - 2 * 4 == 0.75 * 2 * weight.numel()


@pytest.mark.parametrize("stripe", [1, 100, 1 << 20])
def test_matmul_in_stripes(monkeypatch: pytest.MonkeyPatch, stripe: int) -> None:
    monkeypatch.setattr(overflow, "STRIPE", stripe)
    weight, x = unstructured(9, 44, 0.4), torch.randn(6, 44)
    exact = x.double() @ weight.double().T
    found = overflow.matmul_overflow(x, overflow.pack_overflow(weight))
    bound = 44 * torch.finfo(torch.float32).eps * (x.abs() @ weight.abs().T)
    assert bool(((found.double() - exact).abs() <= bound).all())
