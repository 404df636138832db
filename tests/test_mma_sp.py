"""How the Gluon kernel feeds `mma.sp` from the packed form, on an emulator of the instruction.

Gluon has no interpreter, so the index arithmetic of `kernels/sparse24_gluon.py` is written here once more. That the
emulator tells the truth about the hardware is for a GPU to show: there the tests at the end run too, with
TRITON_INTERPRET=0 (`scripts/bench/gpu.py check`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from mma import LANE, mma_sp
from patterns import two_of_four
from torch import nn

from llmprune.kernels import eligibility, sparse24, tuned
from llmprune.kernels.linear24 import SparseLinear24

J = torch.arange(4)


def nibbles(words: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    low, high = (words & 0xFFFFFFFF) >> (4 * c), (words >> 32 & 0xFFFFFFFF) >> (4 * c)
    return (low & 15) | (low >> 12 & 0xF0) | (high & 15) << 8 | (high >> 4 & 0xF000)


def emulate(
    x: torch.Tensor, values: torch.Tensor, metadata: torch.Tensor, block: int, strip: int, steps: range | list[int]
) -> torch.Tensor:
    """Outputs 16 strip … of tokens 8 block …, as the lanes of one warp compute them over its steps; lanes x 4."""
    g, c = LANE // 4, LANE % 4
    row = 16 * strip + g
    pairs = values.unflatten(1, (-1, 2))
    words = metadata.view(torch.int64)
    place = 2 * J + (c // 2)[:, None]
    pair = 8 * (place % 4) + 2 * (place // 4) + (c % 2)[:, None]
    sums = torch.zeros(32, 4, dtype=torch.float64)
    for step in steps:
        low, high = (pairs[rows[:, None], 16 * step + 4 * c[:, None] + J] for rows in (row, row + 8))
        metadata_L = nibbles(words[row, step], c) | nibbles(words[row + 8, step], c) << 16
        token = 8 * block + g
        x_pairs = torch.nn.functional.pad(x, (0, 0, 0, 8)).unflatten(1, (-1, 2))
        first, second = (x_pairs[token[:, None], 32 * step + pair + 4 * half] for half in range(2))
        a_first = torch.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], 1)
        a_second = torch.stack([low[:, 2], high[:, 2], low[:, 3], high[:, 3]], 1)
        sums = mma_sp(a_first, first, sums, metadata_L, 0)
        sums = mma_sp(a_second, second, sums, metadata_L, 1)
    return sums


@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(8, 16, 64), (5, 32, 192), (11, 16, 128)])
def test_packed_form_feeds_the_instruction(tokens: int, outputs: int, inputs: int) -> None:
    weight, x = two_of_four(outputs, inputs, torch.bfloat16), torch.randn(tokens, inputs).bfloat16()
    packed = sparse24.pack24(weight)
    assert eligibility.decode_mma_sp(x, *packed) is None
    exact = x.double() @ weight.double().T
    for block in range(-(-tokens // 8)):
        for strip in range(outputs // 16):
            sums = emulate(x, *packed, block, strip, range(inputs // 64))
            output = 16 * strip + (LANE // 4)[:, None] + 8 * (J // 2)
            token = 8 * block + 2 * (LANE % 4)[:, None] + J % 2
            inside = token < tokens
            torch.testing.assert_close(sums[inside], exact[token[inside], output[inside]], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("warps", "split"), [(1, 1), (4, 1), (2, 3), (8, 4)])
def test_splits_and_warps_share_the_steps(warps: int, split: int) -> None:
    """As the loops of the kernel deal them out: every step once, and the partial sums are the product."""
    weight, x = two_of_four(16, 448, torch.bfloat16), torch.randn(8, 448).bfloat16()
    packed, steps = sparse24.pack24(weight), 448 // 64
    dealt = [
        [first + warp for first in range(part * warps, steps, warps * split) if first + warp < steps]
        for part in range(split)
        for warp in range(warps)
    ]
    assert sorted(step for own in dealt for step in own) == list(range(steps))
    sums = sum(emulate(x, *packed, 0, 0, own) for own in dealt)
    exact = x.double() @ weight.double().T
    output, token = (LANE // 4)[:, None] + 8 * (J // 2), 2 * (LANE % 4)[:, None] + J % 2
    torch.testing.assert_close(sums, exact[token, output], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("x", "weight", "reason"),
    [
        (torch.randn(2, 64).half(), two_of_four(8, 64, torch.float16), "8 outputs are no multiple of 16"),
        (torch.randn(2, 96).half(), two_of_four(16, 96, torch.float16), "96 inputs are no multiple of 64"),
        (torch.randn(2, 65).half()[:, :64], two_of_four(16, 64, torch.float16), "pairs of inputs are not aligned"),
        (torch.randn(2, 66).half()[:, 1:65], two_of_four(16, 64, torch.float16), "pairs of inputs are not aligned"),
    ],
)
def test_what_does_not_fit_is_said(x: torch.Tensor, weight: torch.Tensor, reason: str) -> None:
    assert eligibility.decode_mma_sp(x, *sparse24.pack24(weight)) == reason


# On a GPU.


@pytest.fixture
def gluon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    reason = "there is no GPU" if not torch.cuda.is_available() else eligibility.mma_sp(torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setenv("LLMPRUNE_KERNELS", "matmul24=gluon")
    with torch.device("cuda"):
        yield


def test_metadata_means_what_the_emulator_says(gluon: None) -> None:
    """All pairs of places, in every group of every row; the product with the identity is the matrix, to the bit."""
    pairs = torch.tensor(list(itertools.combinations(range(4), 2)))
    chosen = pairs[(torch.arange(16)[:, None] * 5 + torch.arange(16)) % 6]  # rows x groups x 2
    weight = torch.zeros(16, 16, 4).scatter_(2, chosen, torch.arange(1.0, 513.0).view(16, 16, 2))
    weight = weight.flatten(1).half()  # whole numbers to 512 are exact
    found = sparse24.matmul24(torch.eye(64).half(), *sparse24.pack24(weight))
    assert torch.equal(found.T, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("launch", [(1, 1, 8), (1, 1, 16), (2, 3, 4), (4, 2, 8)], ids=str)
@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(1, 16, 64), (5, 48, 320), (11, 80, 640), (64, 112, 1088)])
def test_matmul24_on_tensor_cores(
    gluon: None, tokens: int, outputs: int, inputs: int, launch: tuple[int, int, int], dtype: torch.dtype
) -> None:
    strips, split, warps = launch
    weight, x = two_of_four(outputs, inputs, dtype), torch.randn(tokens, inputs + 2).to(dtype)[:, :inputs]
    packed = sparse24.pack24(weight)
    with tuned.trial("matmul24_gluon", {"STRIPS": strips, "SPLIT": split, "num_warps": warps, "num_stages": 1}):
        found, again = (sparse24.matmul24(x, *packed) for _ in range(2))
    exact = x.double() @ weight.double().T
    # one rounding of the result, and float32 rounding of every sum
    bound = exact.abs() * torch.finfo(dtype).eps
    bound += inputs * torch.finfo(torch.float32).eps * (x.double().abs() @ weight.double().abs().T)
    assert bool(((found.double() - exact).abs() <= bound).all())
    assert torch.equal(found, again)


def test_layer_in_a_cuda_graph_and_compiled(gluon: None) -> None:
    linear = nn.Linear(128, 64, bias=False)
    linear.weight.data = two_of_four(64, 128)
    layer, x = SparseLinear24.from_linear(linear.half()), torch.randn(4, 128).half()
    expected = layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(x)
    graph.replay()
    assert torch.equal(captured, expected)
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    assert all(torch.equal(compiled(x), expected) for _ in range(3))
