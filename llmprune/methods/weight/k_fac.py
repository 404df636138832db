"""K-FAC: what the loss misses least goes, by a Kronecker-factored curvature, and all other weights move for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llmprune import masks
from llmprune.linalg import inverse, scaled
from llmprune.scores import Score
from llmprune.solvers.least_squares import least_squares
from llmprune.statistics import CURVATURE, GRAM, Stats
from llmprune.types import Budget, Edit, Matrix

# relative size of the gradient on the kept weights at which they count as solved for: two factors, twice the condition
TOLERANCE = 1e-5


@dataclass(frozen=True)
class KFAC:
    """Score by the rise of the loss ½ w_ij² / ([A⁻¹]_jj [G⁻¹]_ii), then the best weights for the mask in that curvature.

    van der Ouderaa et al. 2024, "The LLM Surgeon" (arXiv:2312.17244), section 3, for single weights: the Fisher matrix
    of a weight matrix is taken as G ⊗ A / T, with A = X'X of its inputs over T tokens and G = sum of g g' of the gradients
    of the loss at its outputs. The preset `llm-surgeon` compares the weights of the whole model, as published; `steps`
    prunes in several shots with A and G anew. Deviations: A and G are brought to unit diagonal before they are damped; A is that
    of the inputs that already pruned layers give; all weights that go from a matrix are made up for together, by
    conjugate gradients (the reference solves for at most 2000 at a time, one set after the other); shots follow the cubic
    schedule instead of a straight line.

    Memory: one layer, A and G of its matrices and their inverses, and what enters every layer for all tokens; G of all
    matrices waits on disk.

    `damping`, `damping_outputs`: added to the unit diagonals of A and G. `iterations`: of conjugate gradients, at most.
    """

    damping: float = 0.01
    damping_outputs: float = 0.1
    iterations: int = 100

    kind: ClassVar[str] = "weight"
    needs: ClassVar[frozenset[str]] = frozenset({GRAM, CURVATURE})
    patterns: ClassVar[tuple[str, ...]] = ("unstructured", "N:M")
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2312.17244"

    def __post_init__(self) -> None:
        if self.damping <= 0 or self.damping_outputs <= 0:
            raise ValueError(f"damping {self.damping} and damping_outputs {self.damping_outputs} must be above 0")
        if self.iterations < 1:
            raise ValueError(f"iterations {self.iterations} must be at least 1")

    @property
    def by(self) -> Score:
        """The score, in units of the loss summed over all tokens."""
        return Score(self._score, self.needs, "matrix")

    def planned(self, outputs: int, inputs: int, budget: Budget) -> int:
        return budget.pruned_of(outputs * inputs)

    def solve(self, matrix: Matrix, stats: Stats | None, budget: Budget) -> Edit:
        assert stats is not None and matrix.curvature_OO is not None
        weight_OI = matrix.weight_OI
        outputs, inputs = weight_OI.shape
        if not self.planned(outputs, inputs, budget):
            return Edit.unchanged(weight_OI)
        pruned_OI = masks.select(self._score(matrix, stats), budget, by="matrix")
        new_OI = least_squares(
            weight_OI,
            pruned_OI,
            stats.scaled(self.damping),
            steps=self.iterations,
            tolerance=TOLERANCE,
            outputs=scaled(matrix.curvature_OO, self.damping_outputs),
        )
        return Edit(new_OI.masked_fill(pruned_OI, 0), pruned_OI)

    def _score(self, matrix: Matrix, stats: Stats, seed: int = 0) -> torch.Tensor:
        assert matrix.curvature_OO is not None
        inputs, outputs = stats.scaled(self.damping), scaled(matrix.curvature_OO, self.damping_outputs)
        free_I: torch.Tensor = stats.derived(
            ("inverse diagonal", self.damping), lambda: inverse(inputs.matrix_II, 0.0).diagonal()
        )
        free_O = inverse(outputs.matrix_II, 0.0).diagonal()
        cost_OI = (outputs.scale_I.square() / free_O)[:, None] * (inputs.scale_I.square() / free_I)
        return matrix.weight_OI.square() * cost_OI / (2 * max(stats.tokens, 1))
