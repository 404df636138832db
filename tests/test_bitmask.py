"""Bitmask matrices against the dense ones they stand for."""

from __future__ import annotations

import pytest
import torch
from patterns import unstructured

from llmprune.kernels import bitmask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("outputs", "inputs"), [(2, 1), (3, 31), (5, 32), (9, 33), (40, 200)])
def test_packing_is_exact(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    weight = unstructured(outputs, inputs, 0.6, dtype)
    weight[0, 0], weight[1, -1] = float("nan"), -0.0
    packed = bitmask.pack_bitmask(weight)
    found = bitmask.unpack_bitmask(packed)
    whole = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(found.view(whole), weight.view(whole))
    assert torch.equal(bitmask.unpack_bitmask(packed, slice(1, 3)).view(whole), weight[1:3].view(whole))


def test_layout_is_the_documented_one() -> None:
    weight = torch.zeros(2, 40)
    weight[0, 0], weight[0, 31], weight[0, 33], weight[1, 39] = 1, 2, 3, 4
    packed = bitmask.pack_bitmask(weight)
    assert packed.values_V.tolist() == [1, 2, 3, 4]
    assert packed.words_OW.tolist() == [[1 - (1 << 31), 2], [0, 1 << 7]]
    assert packed.offsets_OW.tolist() == [[0, 2], [0, 0]]
    assert packed.starts_O1.tolist() == [0, 3, 4]


@pytest.mark.parametrize(("sparsity", "ratio"), [(0.5, 0.59375), (0.7, 0.39375)])
def test_memory_beside_dense(sparsity: float, ratio: float) -> None:
    weight = torch.ones(200, 1280, dtype=torch.bfloat16)
    weight[:, : round(1280 * sparsity)] = 0
    starts = 8 * 201
    assert bitmask.pack_bitmask(weight).bytes - starts == ratio * 2 * weight.numel()
    assert starts < 0.004 * 2 * weight.numel()


def test_offsets_use_all_sixteen_bits() -> None:
    weight = torch.ones(2, 1 << 16, dtype=torch.float16)
    packed = bitmask.pack_bitmask(weight)
    assert packed.offsets_OW[0, -1].item() & 0xFFFF == (1 << 16) - 32
    with pytest.raises(ValueError, match="65537 inputs"):
        bitmask.pack_bitmask(torch.ones(1, (1 << 16) + 1))


@pytest.mark.parametrize("stripe", [1, 100, 1 << 20])
def test_matmul_in_stripes(monkeypatch: pytest.MonkeyPatch, stripe: int) -> None:
    monkeypatch.setattr(bitmask, "STRIPE", stripe)
    weight, x = unstructured(9, 45, 0.5), torch.randn(6, 45)
    exact = x.double() @ weight.double().T
    found = bitmask.matmul_bitmask(x, bitmask.pack_bitmask(weight))
    bound = 45 * torch.finfo(torch.float32).eps * (x.abs() @ weight.abs().T)
    assert bool(((found.double() - exact).abs() <= bound).all())
