"""LLM Surgeon, structured: heads and channels by the rise of the loss that a Kronecker-factored curvature foresees."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from llmprune.engine.curvature import output_grams
from llmprune.engine.trunk import Trunk
from llmprune.engine.widths import Evidence
from llmprune.linalg import symmetric
from llmprune.methods.structural import Narrow, Narrowed
from llmprune.methods.width.choice import Way
from llmprune.methods.width.sequential import UnitMethod, narrow
from llmprune.solvers.groups import damped


@dataclass(frozen=True)
class LLMSurgeonStructured(UnitMethod):
    """Group OBS in the curvature G ⊗ A: the unit S goes for which tr(inverse(A⁻¹_SS) W_S' G W_S) is least.

    van der Ouderaa et al. 2024, "The LLM Surgeon" (arXiv:2312.17244), section 3, for columns: W is o or down, A = X'X of
    its inputs, G the sum of g g' of the gradients of the loss at its outputs in the dense model. What the columns that
    stay make up for does not depend on G: it is the least squares fit. Deviations: units are whole heads and channels,
    whose rows in the matrices before go with them unscored, since all they do passes through these columns; a unit
    goes at a time, with the others' scores made anew; one shot (`stages` makes several), as many units of every
    layer as `allocation` says.

    `damping`, `damping_outputs`: of A and G, as fractions of their mean diagonals.
    """

    damping: float = 0.01
    damping_outputs: float = 0.1

    paper: ClassVar[str] = "arXiv:2312.17244"
    memory: ClassVar[str] = (
        "what enters every layer for all tokens, a square matrix of the hidden width for every o and down, two of the "
        "inner width in float64, and the new o and down matrices of all layers"
    )

    def __post_init__(self) -> None:
        if not 0 < self.damping_outputs <= 1:
            raise ValueError(f"damping_outputs {self.damping_outputs} must be above 0 and at most 1")

    def way(self) -> Way:
        return Way(None, "least-squares", damping=self.damping)

    def decide(self, trunk: Trunk, asked: Narrow) -> Narrowed:
        writers: list[set[str]] = [set() for _ in trunk.units]
        for (layer, _), units in asked.units.items():
            if layer is not None and units.writer is not None:
                writers[layer].add(units.writer.name.removeprefix(trunk.units[layer].prefix))
        grams = {
            trunk.units[index].prefix + name: gram_OO
            for index, found in output_grams(trunk, [sorted(one) for one in writers])
            for name, gram_OO in found.items()
        }

        def weigh(evidence: Evidence) -> torch.Tensor:
            """L'W, with G = L L'."""
            weight_OI = evidence.writer_OI.double()
            lower_OO = grams.get(evidence.matrix)
            if lower_OO is None:  # an expert that the dense model sends no token to
                return weight_OI
            factor_OO: torch.Tensor = torch.linalg.cholesky(damped(symmetric(lower_OO), self.damping_outputs))
            return factor_OO.T @ weight_OI

        return narrow(trunk, asked, replace(self.way(), weigh=weigh))
