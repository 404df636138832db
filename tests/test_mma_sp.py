"""How the Gluon kernel feeds `mma.sp` from the packed form, on an emulator of the instruction.

Gluon has no interpreter, so the index arithmetic of `kernels/sparse24_gluon.py` is written here once more. That the
emulator tells the truth about the hardware is for a GPU to show.
"""

from __future__ import annotations

import pytest
import torch
from mma import LANE, mma_sp
from patterns import two_of_four

from llmprune.kernels import eligibility, sparse24

J = torch.arange(4)


def nibbles(words: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    low, high = (words & 0xFFFFFFFF) >> (4 * c), (words >> 32 & 0xFFFFFFFF) >> (4 * c)
    return (low & 15) | (low >> 12 & 0xF0) | (high & 15) << 8 | (high >> 4 & 0xF000)


def emulate(x: torch.Tensor, values: torch.Tensor, metadata: torch.Tensor, block: int, strip: int) -> torch.Tensor:
    """Outputs 16 strip … of tokens 8 block …, as the lanes of one warp compute them; lanes x 4."""
    g, c = LANE // 4, LANE % 4
    row, inputs = 16 * strip + g, x.shape[1]
    pairs = values.unflatten(1, (-1, 2))
    words = metadata.view(torch.int64)
    place = 2 * J + (c // 2)[:, None]
    pair = 8 * (place % 4) + 2 * (place // 4) + (c % 2)[:, None]
    sums = torch.zeros(32, 4, dtype=torch.float64)
    for step in range(inputs // 64):
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
            sums = emulate(x, *packed, block, strip)
            output = 16 * strip + (LANE // 4)[:, None] + 8 * (J // 2)
            token = 8 * block + 2 * (LANE % 4)[:, None] + J % 2
            inside = token < tokens
            torch.testing.assert_close(sums[inside], exact[token[inside], output[inside]], rtol=1e-12, atol=1e-12)


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
