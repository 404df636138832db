"""LoSparse: a matrix as the sum of one of low rank and a sparse one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from llmprune import masks
from llmprune.statistics import Stats
from llmprune.types import Budget, Edit, Matrix


@dataclass(frozen=True)
class LoSparse:
    """W = B A + S, with as many numbers in B, A and S together as the budget leaves of W.

    After Li et al. 2023, "LoSparse: Structured Compression of Large Language Models based on Low-Rank and Sparse
    Approximation" (arXiv:2306.11222), eq. 3-4. Deviations: S loses single weights by size, not rows by sensitivity, and
    nothing is trained; the two parts are fitted by turns, each the best for the other in the Frobenius norm, as in GoDec
    (Zhou and Tao 2011). Needs no text; `iterations` singular value decompositions a matrix.

    The sum is what is stored: a dense matrix without zeros, which is no smaller and shows what the split would
    cost. `split`: S is stored in its place, and B and A beside the model as an adapter in PEFT's format.
    `share`: of the numbers that stay, those in B and A.
    """

    share: float = 0.5
    iterations: int = 10
    split: bool = False

    kind: ClassVar[str] = "weight"
    needs: ClassVar[frozenset[str]] = frozenset()
    patterns: ClassVar[tuple[str, ...]] = ("unstructured",)
    output: ClassVar[str] = "low rank and sparse"
    paper: ClassVar[str] = "arXiv:2306.11222"

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share {self.share} must lie in 0 … 1")
        if self.iterations < 1:
            raise ValueError(f"iterations {self.iterations} must be at least 1")

    def planned(self, outputs: int, inputs: int, budget: Budget) -> int:
        return self._sizes(outputs, inputs, budget)[1] if self.split else 0

    def solve(self, matrix: Matrix, stats: Stats | None, budget: Budget) -> Edit:
        weight_OI = matrix.weight_OI
        if not budget.pruned_of(weight_OI.numel()):
            return Edit.unchanged(weight_OI)
        b_OR, a_RI, sparse_OI, pruned_OI = self.parts(weight_OI, budget)
        sum_OI = b_OR @ a_RI + sparse_OI
        lost = float((sum_OI - weight_OI).square().sum() / weight_OI.square().sum())
        notes: dict[str, Any] = {"rank": len(a_RI), "zeros_of_sparse_part": int(pruned_OI.sum()), "error_of_sum": lost}
        if self.split:
            return Edit(sparse_OI, pruned_OI, notes)
        return Edit(sum_OI, torch.zeros_like(pruned_OI), notes)

    def parts(
        self, weight_OI: torch.Tensor, budget: Budget
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """B (O x R), A (R x I), S, and where S is zero (bool, O x I)."""
        outputs, inputs = weight_OI.shape
        rank, zeros = self._sizes(outputs, inputs, budget)
        sparse_OI = torch.zeros_like(weight_OI)
        for _ in range(self.iterations):
            u_OK, size_K, v_KI = torch.linalg.svd(weight_OI - sparse_OI, full_matrices=False)
            root_R = size_K[:rank].sqrt()
            b_OR, a_RI = u_OK[:, :rank] * root_R, root_R[:, None] * v_KI[:rank]
            rest_OI = weight_OI - b_OR @ a_RI
            pruned_OI = masks.lowest(rest_OI.abs().reshape(1, -1), zeros).view_as(rest_OI)
            sparse_OI = rest_OI.masked_fill(pruned_OI, 0)
        return b_OR, a_RI, sparse_OI, pruned_OI

    def _sizes(self, outputs: int, inputs: int, budget: Budget) -> tuple[int, int]:
        """The rank of B A, and the zeros in S."""
        gone = budget.pruned_of(outputs * inputs)
        if not gone:
            return 0, 0
        rank = min(int(self.share * (outputs * inputs - gone) / (outputs + inputs)), outputs, inputs)
        return rank, min(gone + rank * (outputs + inputs), outputs * inputs)
