"""Products and quadratic forms against float64, whichever library computes them."""

from __future__ import annotations

import pytest
import torch
from draws import normal
from torch import nn

from llmprune.kernels import product
from llmprune.kernels.gram import gram_update_
from llmprune.linalg import output_energy

EPSILON = torch.finfo(torch.float32).eps


@pytest.fixture(params=["chosen", "torch", "onednn"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The products of this machine, and each library by force."""
    if request.param == "onednn" and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    if request.param != "chosen":
        monkeypatch.setenv("LLMPRUNE_KERNELS", f"product={request.param}")
    return str(request.param)


def assert_product(found: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Within the rounding of a float32 sum of K terms, entry by entry: K eps |a| |b|'."""
    exact = a.double() @ b.double().T
    bound = a.shape[1] * EPSILON * (a.double().abs() @ b.double().abs().T)
    assert found.dtype == torch.float32
    assert bool(((found.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (3, 5, 7), (65, 129, 257), (128, 96, 32), (300, 700, 111)])
def test_product(library: str, m: int, n: int, k: int) -> None:
    a, b = normal(m, k), normal(n, k, seed=1)
    assert_product(product.product_nt(a, b), a, b)


def test_product_of_slices_and_transposes(library: str) -> None:
    a, b = normal(130, 300), normal(90, 300, seed=1)
    wide_a, wide_b = normal(130, 400), normal(90, 400, seed=1)
    tall_a, tall_b = normal(300, 130), normal(300, 90, seed=1)
    assert_product(product.product_nt(wide_a[:, 50:350], wide_b[:, 50:350]), wide_a[:, 50:350], wide_b[:, 50:350])
    assert_product(product.product_nt(tall_a.T, tall_b.T), tall_a.T, tall_b.T)
    assert_product(product.product_nt(tall_a[:, 3:70].T, tall_b[:, 5:80].T), tall_a[:, 3:70].T, tall_b[:, 5:80].T)
    assert_product(product.product_nt(a, tall_b.T), a, tall_b.T)
    assert_product(product.product_nt(tall_a.T, b), tall_a.T, b)


@pytest.mark.parametrize("shape", [(300,), (7, 300), (2, 9, 300), (0, 300)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_layers_keep_their_values(library: str, shape: tuple[int, ...], bias: bool) -> None:
    layer = nn.Linear(300, 40, bias=bias)
    x = normal(*shape)
    with torch.no_grad():
        plain = layer(x)
        with product.FastLinear():
            fast = layer(x)
    assert fast.shape == plain.shape
    scale = x.abs() @ layer.weight.abs().T + (0 if layer.bias is None else layer.bias.abs())
    assert bool(((fast - plain).abs() <= 2 * 301 * EPSILON * scale).all())


def test_other_dtypes_are_left_to_torch() -> None:
    layer = nn.Linear(2048, 2048).bfloat16()
    x = normal(4, 2048).bfloat16()
    with torch.no_grad():
        plain = layer(x)
        with product.FastLinear():
            assert torch.equal(layer(x), plain)


def test_gram_update(library: str) -> None:
    x = normal(333, 95)
    lower = gram_update_(torch.zeros(95, 95), x).tril()
    exact = (x.double().T @ x.double()).tril()
    bound = 333 * EPSILON * (x.double().abs().T @ x.double().abs())
    assert bool(((lower.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (5, 8), (40, 63), (33, 200)])
def test_output_energy_reads_the_lower_triangle_only(library: str, outputs: int, inputs: int) -> None:
    x, weight = normal(400, inputs), normal(outputs, inputs, seed=2)
    gram = x.T @ x
    poisoned = gram.tril() + torch.full_like(gram, float("nan")).triu(1)
    exact = float((x.double() @ weight.double().T).square().sum())
    bound = 4 * inputs * EPSILON * float((weight.abs() @ gram.abs() @ weight.abs().T).diagonal().double().sum())
    assert output_energy(weight, poisoned) == pytest.approx(exact, abs=bound + 400 * EPSILON * exact, rel=0)
