"""The sparse tensor-core instruction `mma.sp.m16n8k32` on CPU: 32 lanes, their registers, and nothing else.

Written from the figures of the PTX ISA (matrix fragments for mma.sp.m16n8k32 with 16-bit inputs). Pairs of values that
share a register are the last axis.
"""

from __future__ import annotations

import torch

LANE = torch.arange(32)
QUAD, MEMBER = LANE // 4, LANE % 4


def mma_sp(
    a_LJ2: torch.Tensor, b_LJ2: torch.Tensor, c_LJ: torch.Tensor, metadata_L: torch.Tensor, selector: int
) -> torch.Tensor:
    """D = A B + C. Registers: A and B 32 x 4 pairs, C and D 32 x 4; metadata 32 words, of two lanes in every four."""
    kept = torch.zeros(16, 16, dtype=torch.float64)
    dense_b = torch.zeros(32, 8, dtype=torch.float64)
    for j in range(4):
        for half in range(2):
            kept[QUAD + 8 * (j % 2), 2 * MEMBER + half + 8 * (j // 2)] = a_LJ2[:, j, half].double()
            dense_b[8 * j + 2 * MEMBER + half, QUAD] = b_LJ2[:, j, half].double()
    dense_a = torch.zeros(16, 32, dtype=torch.float64)
    for row in range(16):
        for group in range(8):
            word = int(metadata_L[4 * (row % 8) + 2 * selector + group // 4])
            nibble = word >> (16 * (row // 8) + 4 * (group % 4)) & 15
            first, second = nibble & 3, nibble >> 2
            assert first < second, "the places of a group must be in order"
            dense_a[row, 4 * group + first] = kept[row, 2 * group]
            dense_a[row, 4 * group + second] = kept[row, 2 * group + 1]
    product = dense_a @ dense_b
    found = c_LJ.clone()
    for j in range(4):
        found[:, j] += product[QUAD + 8 * (j // 2), 2 * MEMBER + j % 2]
    return found
