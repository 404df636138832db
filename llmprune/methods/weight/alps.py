"""ALPS: choose mask and weights together, then polish the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llmprune import masks
from llmprune.kernels.product import product_nt
from llmprune.linalg import Scaled, scaled
from llmprune.solvers.least_squares import least_squares
from llmprune.statistics import GRAM, Stats
from llmprune.types import Budget, Edit, Matrix

EVERY = 3  # iterations between two looks at the mask
ENOUGH = 30  # iterations after which a mask that hardly moves counts as settled
SETTLED = 3e-4  # share of the kept weights
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # how much of the mask moved, what the penalty is multiplied by


@dataclass(frozen=True)
class Alps:
    """ADMM whose penalty follows the movement of the mask, then conjugate gradients on that mask.

    Meng et al. 2024, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language
    Models" (arXiv:2406.07831), algorithm 1 and section 3.3, with the numbers of the authors' code: the damped Gram
    matrix is scaled to unit diagonal and decomposed once, every third iteration the penalty grows by 1.3, 1.2 or
    1.1 for at least 10 %, 0.5 % or any of the kept weights having changed, and it ends when none has. `admm` is
    the same splitting on a fixed schedule.

    `damping`: fraction of the mean of the Gram diagonal added to it. `rho`: the penalty at the start, on the scale
    of the unit diagonal. `iterations`: the most there may be. `polish`: steps of conjugate gradients.
    """

    damping: float = 0.01
    rho: float = 0.1
    iterations: int = 300
    polish: int = 10

    kind: ClassVar[str] = "weight"
    needs: ClassVar[frozenset[str]] = frozenset({GRAM})
    patterns: ClassVar[tuple[str, ...]] = ("unstructured", "N:M")
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2406.07831"

    def __post_init__(self) -> None:
        if self.damping <= 0 or self.rho <= 0:
            raise ValueError(f"damping {self.damping} and rho {self.rho} must be above 0")
        if self.iterations < 1 or self.polish < 0:
            raise ValueError(f"iterations {self.iterations} must be at least 1, polish {self.polish} at least 0")

    def planned(self, outputs: int, inputs: int, budget: Budget) -> int:
        return budget.pruned_of(outputs * inputs)

    def solve(self, matrix: Matrix, stats: Stats | None, budget: Budget) -> Edit:
        assert stats is not None
        weight_OI = matrix.weight_OI
        outputs, inputs = weight_OI.shape
        if not self.planned(outputs, inputs, budget):
            return Edit.unchanged(weight_OI)
        system, values_I, vectors_II = stats.derived(("eigen", self.damping), lambda: self._decompose(stats))
        found_OI, pruned_OI, iterations = self._search(weight_OI * system.scale_I, budget, system, values_I, vectors_II)
        start_OI = found_OI / system.scale_I
        new_OI = least_squares(weight_OI, pruned_OI, system, start_OI=start_OI, steps=self.polish)
        return Edit(new_OI, pruned_OI, {"iterations": iterations})

    def _decompose(self, stats: Stats) -> tuple[Scaled, torch.Tensor, torch.Tensor]:
        damped_II = stats.gram_lower_II.clone()
        damped_II.diagonal().add_(self.damping * damped_II.diagonal().mean())
        system = scaled(damped_II, 0.0)
        values_I, vectors_II = torch.linalg.eigh(system.matrix_II.double())
        return system, values_I, vectors_II

    def _search(
        self,
        dense_OI: torch.Tensor,
        budget: Budget,
        system: Scaled,
        values_I: torch.Tensor,
        vectors_II: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The weights (on the scale of the unit diagonal) and the mask on which ADMM settles, after how many iterations."""

        def inverse(rho: float) -> torch.Tensor:
            return ((vectors_II / (values_I + rho)) @ vectors_II.T).float()

        pull_OI = product_nt(dense_OI, system.matrix_II)
        kept = dense_OI.numel() - budget.pruned_of(dense_OI.numel())
        rho, moved_ever = self.rho, False
        ridge_II = inverse(rho)
        pruned_OI = masks.select(dense_OI.abs(), budget, by="matrix")
        sparse_OI, dual_OI, before_OI = dense_OI.masked_fill(pruned_OI, 0), torch.zeros_like(dense_OI), pruned_OI
        for iteration in range(1, self.iterations + 1):
            free_OI = product_nt(pull_OI + rho * (sparse_OI - dual_OI), ridge_II) + dual_OI
            pruned_OI = masks.select(free_OI.abs(), budget, by="matrix")
            sparse_OI = free_OI.masked_fill(pruned_OI, 0)
            dual_OI = free_OI - sparse_OI
            if iteration % EVERY:
                continue
            moved = int((pruned_OI != before_OI).sum())
            before_OI = pruned_OI
            if not moved and moved_ever:
                return sparse_OI, pruned_OI, iteration
            if iteration >= ENOUGH and moved < SETTLED * kept:
                return sparse_OI, pruned_OI, iteration
            # a mask that never moved is held by too strong a penalty
            factor = next(growth for share, growth in GROWTH if moved >= share * kept) if moved else 0.2
            moved_ever = moved_ever or moved > 0
            rho *= factor
            dual_OI = dual_OI / factor
            ridge_II = inverse(rho)
        return sparse_OI, pruned_OI, self.iterations
