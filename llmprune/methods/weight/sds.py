"""SDS: prune, make dense again with what was pruned held small, and prune that."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from llmprune.methods.weight.sparsegpt import SparseGPT
from llmprune.solvers.least_squares import redense
from llmprune.statistics import GRAM, Stats
from llmprune.types import Budget, Edit, Matrix


@dataclass(frozen=True)
class Sds:
    """Sparse, dense, sparse: SparseGPT's mask, dense weights that lean towards it, and SparseGPT on those.

    Li et al. 2024, "Enhancing One-Shot Pruned Pre-trained Language Models through Sparse-Dense-Sparse Mechanism"
    (arXiv:2408.10473), known from its abstract. Deviation: the dense weights are the exact minimum of the output error
    and of a quadratic penalty on what was pruned, where the authors train with regularisation.

    `damping`: as SparseGPT's. `penalty`: how strongly the first mask is held, in units of an input's own energy.
    """

    damping: float = 0.01
    penalty: float = 3.0

    kind: ClassVar[str] = "weight"
    needs: ClassVar[frozenset[str]] = frozenset({GRAM})
    patterns: ClassVar[tuple[str, ...]] = ("unstructured", "N:M")
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2408.10473"

    def __post_init__(self) -> None:
        SparseGPT(self.damping)  # raises ValueError
        if not self.penalty >= 0:
            raise ValueError(f"penalty {self.penalty} must not be negative")

    def planned(self, outputs: int, inputs: int, budget: Budget) -> int:
        return SparseGPT(self.damping).planned(outputs, inputs, budget)

    def solve(self, matrix: Matrix, stats: Stats | None, budget: Budget) -> Edit:
        assert stats is not None
        sparse = SparseGPT(self.damping).solve(matrix, stats, budget)
        outputs, inputs = matrix.weight_OI.shape
        if not self.planned(outputs, inputs, budget):
            return sparse
        dense_OI = redense(matrix.weight_OI, sparse.pruned_OI, stats.scaled(self.damping), self.penalty)
        # its loss is measured from the weights in between
        return replace(SparseGPT(self.damping).solve(replace(matrix, weight_OI=dense_OI), stats, budget), loss=None)
