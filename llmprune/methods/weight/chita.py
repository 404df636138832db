"""CHITA: choose mask and weights together, by descent on a quadratic model of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llmprune import masks
from llmprune.methods.weight.obert import Obert
from llmprune.solvers.block_fisher import BlockFisher
from llmprune.statistics import FISHER, Stats
from llmprune.types import Budget, Edit, Matrix


@dataclass(frozen=True)
class Chita:
    """Iterative hard thresholding from oBERT's mask, then the best weights for the mask that it ends in.

    After Benbaki et al. 2023, "Fast as CHITA: Neural Network Pruning with Combinatorial Optimization"
    (arXiv:2302.14623), eq. 3-5 and algorithm 1: least squares on the gradients of the sequences, with a ridge. Every step
    takes the gradient of ½ d' F d on weights scaled to unit curvature, as long as each block allows, and keeps those
    that lower its bound most, so the model of the loss never rises. Deviations: F is the block Fisher of `obert`, not
    a product of all gradients of the model; no linear term, which on few sequences fits their noise; a fixed step in
    place of line search and active sets.

    `damping`: added to the diagonal, as a share of its mean in the matrix. `iterations`: steps at most; it ends when
    the mask stays with the best weights for it.
    """

    damping: float = 0.1
    iterations: int = 100

    kind: ClassVar[str] = "weight"
    needs: ClassVar[frozenset[str]] = frozenset({FISHER})
    patterns: ClassVar[tuple[str, ...]] = ("unstructured", "N:M")
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2302.14623"

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise ValueError(f"damping {self.damping} must be above 0")
        if self.iterations < 0:
            raise ValueError(f"iterations {self.iterations} must not be negative")

    def planned(self, outputs: int, inputs: int, budget: Budget) -> int:
        return budget.pruned_of(outputs * inputs)

    def solve(self, matrix: Matrix, stats: Stats | None, budget: Budget) -> Edit:
        assert matrix.gradient is not None
        start = Obert(self.damping).solve(matrix, stats, budget)
        outputs, inputs = matrix.weight_OI.shape
        if not self.planned(outputs, inputs, budget):
            return start
        fisher = BlockFisher.of(matrix.gradient, self.damping)
        dense_NB, now_NB, pruned_OI = fisher.arrange(matrix.weight_OI), fisher.arrange(start.weight_OI), start.pruned_OI
        # the quadratic bound on each weight whose sum is nowhere below the model
        bound_NB = fisher.steepness()[:, None] * fisher.diagonal()
        best = True
        for _ in range(self.iterations):
            free_NB = now_NB - fisher.slope(now_NB - dense_NB) / bound_NB
            before_OI = pruned_OI
            pruned_OI = masks.select(fisher.restore(bound_NB * free_NB.square()), budget, by="matrix")
            kept_NB = fisher.arrange(~pruned_OI)
            stays = torch.equal(pruned_OI, before_OI)
            if stays and best:
                break
            now_NB, best = fisher.optimum(dense_NB, kept_NB) if stays else free_NB * kept_NB, stays
        if not best:
            now_NB = fisher.optimum(dense_NB, fisher.arrange(~pruned_OI))
        return Edit(fisher.restore(now_NB), pruned_OI)
