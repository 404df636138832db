"""oBERT: optimal brain surgeon with the Fisher matrix of the loss, block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmprune import masks
from llmprune.solvers.block_fisher import BlockFisher
from llmprune.statistics import FISHER, Stats
from llmprune.types import Budget, Edit, Matrix


@dataclass(frozen=True)
class Obert:
    """Remove the weights with the least w² / (2 [inverse F]_jj), and move those of the same block for the rest.

    Kurtic et al. 2022, "The Optimal BERT Surgeon" (arXiv:2203.07259), eq. 3-6: F is the empirical Fisher matrix of the
    loss within blocks of 32 consecutive weights of a row (the authors take 50). Deviations: all that go from a block are
    made up for jointly, where the authors add up the updates of single weights; the inverse comes from a Cholesky
    factorization of every block, not from rank-1 updates by Woodbury's formula, and is the same. The
    authors prune gradually, which is `steps`.

    `damping`: added to the diagonal, as a share of its mean in the matrix.
    """

    damping: float = 0.1

    kind: ClassVar[str] = "weight"
    needs: ClassVar[frozenset[str]] = frozenset({FISHER})
    patterns: ClassVar[tuple[str, ...]] = ("unstructured", "N:M")
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2203.07259"

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise ValueError(f"damping {self.damping} must be above 0")

    def planned(self, outputs: int, inputs: int, budget: Budget) -> int:
        return budget.pruned_of(outputs * inputs)

    def solve(self, matrix: Matrix, stats: Stats | None, budget: Budget) -> Edit:
        assert matrix.gradient is not None
        outputs, inputs = matrix.weight_OI.shape
        if not self.planned(outputs, inputs, budget):
            return Edit.unchanged(matrix.weight_OI)
        fisher = BlockFisher.of(matrix.gradient, self.damping)
        weight_NB = fisher.arrange(matrix.weight_OI)
        pruned_OI = masks.select(fisher.restore(fisher.saliency(weight_NB)), budget, by="matrix")
        best_NB = fisher.optimum(weight_NB, fisher.arrange(~pruned_OI))
        return Edit(fisher.restore(best_NB), pruned_OI)
