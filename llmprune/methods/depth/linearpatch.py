"""LinearPatch: drop a window of layers, and rescale the channels at the cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llmprune.engine.trunk import States, Trunk
from llmprune.methods.structural import Decision, Drop
from llmprune.methods.windows import FoldedWindow


@dataclass(frozen=True)
class LinearPatch(FoldedWindow):
    """The state at the cut is multiplied by H diag(s) H' with a Hadamard matrix H and s_c = E|y_c| / E|x_c|.

    Chen et al. 2025, "A Simple Linear Patch Revives Layer-Pruned Large Language Models", section 3: x enters and y
    leaves the window, both in the basis H. The patch is a matrix on the whole state, which no plain class has a place
    for. Deviation, for plain output: the MLP before the window is fitted (least squares, as ReplaceMe) to give
    the patched state. Where the width is no power of two, H is block-diagonal.
    """

    paper: ClassVar[str] = "arXiv:2505.24680"

    def decide(self, trunk: Trunk, drop: Drop) -> Decision:
        decision, dropped, fitted = self.fold(trunk, drop, _patched)
        decision.notes = {
            "squared_distance_to_patch_dropped": dropped,
            "squared_distance_to_patch_fitted": fitted,
        }
        return decision


def _patched(before: States, after: States) -> States:
    """The states before the window, each channel in the Hadamard basis scaled to its mean size after it."""
    basis_DD = hadamard(before[0].shape[-1]).to(before[0].device)
    size_before_D, size_after_D = (
        torch.stack([(one.double() @ basis_DD).abs().flatten(0, 1).sum(0) for one in states]).sum(0)
        for states in (before, after)
    )
    scale_D = size_after_D / size_before_D.clamp_min(torch.finfo(torch.float64).tiny)
    patch_DD = basis_DD @ torch.diag(scale_D) @ basis_DD.T
    return [one.double() @ patch_DD for one in before]


def hadamard(width: int) -> torch.Tensor:
    """An orthonormal Hadamard matrix of the largest power of two that divides `width`, along the diagonal."""
    block = torch.ones(1, 1, dtype=torch.float64)
    while width % (2 * len(block)) == 0:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    return torch.kron(torch.eye(width // len(block), dtype=torch.float64), block / len(block) ** 0.5)
