"""ADMM: choose mask and weights together, by turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llmprune import masks
from llmprune.kernels.product import product_nt
from llmprune.linalg import inverse
from llmprune.statistics import GRAM, Stats
from llmprune.types import Budget, Edit, Matrix


@dataclass(frozen=True)
class Admm:
    """Alternate between the ridge solution and the nearest sparse matrix, with a growing penalty.

    Boza 2024, "Fast and Effective Weight Update for Pruned Large Language Models" (arXiv:2401.02938),
    on the Gram matrix with unit diagonal. Deviations: the mask is chosen by matrix from the iterate itself
    (the paper's is by Wanda's score with a gradually growing sparsity), and the penalty grows while the mask
    moves, as in ALPS (Meng et al. 2024, arXiv:2406.07831).

    `damping`: added to the unit diagonal. `iterations`: turns; in the first `mask_iterations` of them the mask
    is chosen anew. `rho`: the penalty at the start, on the scale of the unit diagonal; every `every` turns it
    grows by `growth` as long as the mask moves.
    """

    damping: float = 0.01
    iterations: int = 30
    mask_iterations: int = 24
    rho: float = 0.1
    growth: float = 2.0
    every: int = 6

    kind: ClassVar[str] = "weight"
    needs: ClassVar[frozenset[str]] = frozenset({GRAM})
    patterns: ClassVar[tuple[str, ...]] = ("unstructured", "N:M")
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2401.02938"

    def __post_init__(self) -> None:
        if self.damping <= 0 or self.rho <= 0:
            raise ValueError(f"damping {self.damping} and rho {self.rho} must be above 0")
        if not 0 < self.mask_iterations <= self.iterations:
            raise ValueError(f"mask_iterations {self.mask_iterations} must lie in 1 … iterations ({self.iterations})")
        if self.growth < 1 or self.every < 1:
            raise ValueError(f"growth {self.growth} and every {self.every} must be at least 1")

    def planned(self, outputs: int, inputs: int, budget: Budget) -> int:
        return budget.pruned_of(outputs * inputs)

    def solve(self, matrix: Matrix, stats: Stats | None, budget: Budget) -> Edit:
        assert stats is not None
        outputs, inputs = matrix.weight_OI.shape
        if not self.planned(outputs, inputs, budget):
            return Edit.unchanged(matrix.weight_OI)
        system = stats.scaled(self.damping)
        dense_OI = matrix.weight_OI * system.scale_I
        pull_OI = product_nt(dense_OI, system.matrix_II)
        ridge_OI, dual_OI = dense_OI, torch.zeros_like(dense_OI)
        pruned_OI = torch.zeros_like(dense_OI, dtype=torch.bool)
        sparse_OI, rho = dense_OI, self.rho
        ridge_II = inverse(system.matrix_II, rho)
        for turn in range(self.iterations):
            choosing = turn < self.mask_iterations
            free_OI = ridge_OI + dual_OI
            if choosing:
                pruned_OI = masks.select(free_OI.abs(), budget, by="matrix")
            sparse_OI = free_OI.masked_fill(pruned_OI, 0)
            dual_OI = free_OI - sparse_OI
            ridge_OI = product_nt(pull_OI + rho * (sparse_OI - dual_OI), ridge_II)
            if choosing and turn % self.every == self.every - 1:
                rho *= self.growth
                dual_OI /= self.growth
                ridge_II = inverse(system.matrix_II, rho)
        return Edit(sparse_OI / system.scale_I, pruned_OI)
