"""BESA: how much of every row goes is learnt from the error of the layer; which weights these are, by Wanda."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llmprune import scores
from llmprune.allocation.fit import counts
from llmprune.engine.layer import Layer, Solved
from llmprune.masks import lowest
from llmprune.statistics import MOMENTS, Stats
from llmprune.types import Budget, Edit, Matrix

# sparsities to choose from: 0, 1 %, … 100 %
CANDIDATES = 101
# how far around the asked sparsity the choice is spread at first
SPREAD = 0.05


@dataclass(frozen=True)
class BESA:
    """Learn a distribution over sparsities for every row (or matrix) of a layer, all of its matrices at once.

    Xu et al. 2024, "BESA: Pruning Large Language Models with Blockwise Parameter-Efficient Sparsity Allocation"
    (arXiv:2402.16880), section 3.2. A weight is pruned with the probability that the sparsity of its row is above its
    rank by Wanda's score there; it is where this is at least the expected sparsity, with a straight-through gradient.
    The loss is the squared error of the layer's output over its energy, plus `penalty` times the squared relative
    distance of the layer's sparsity to the one asked for. Layer after layer, on what the pruned layers before give,
    towards the outputs of the dense model; kept weights stay as they are. Deviations: Adam with a fixed step length in
    place of Prodigy; the distribution starts as a bell around the sparsity asked for; afterwards all rows are moved
    alike until the layer has exactly the zeros asked for, no row losing more than 99 %.

    Memory: about ten float32 values a weight of one layer, and the activations of one batch with autograd.

    `rows`: whether every row has a sparsity of its own, or every matrix. `epochs`: times through all batches. `rate`:
    the step length. `seed`: of the order of the batches.
    """

    rows: bool = True
    epochs: int = 4
    rate: float = 0.05
    penalty: float = 5.0
    seed: int = 0

    kind: ClassVar[str] = "weight"
    needs: ClassVar[frozenset[str]] = frozenset({MOMENTS})
    patterns: ClassVar[tuple[str, ...]] = ("unstructured",)
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2402.16880"

    def __post_init__(self) -> None:
        if self.epochs < 1 or not self.rate > 0 or self.penalty < 0:
            raise ValueError(f"epochs {self.epochs}, rate {self.rate} and penalty {self.penalty} must be above 0")

    def planned(self, outputs: int, inputs: int, budget: Budget) -> int:
        return outputs * budget.pruned_of(inputs)

    def solve(self, matrix: Matrix, stats: Stats | None, budget: Budget) -> Edit:
        """Wanda's mask, with which the layer is gone through until all of its matrices are known."""
        assert stats is not None
        pruned_OI = lowest(scores.wanda(matrix, stats), budget.pruned_of(matrix.weight_OI.shape[1]))
        return Edit(matrix.weight_OI.masked_fill(pruned_OI, 0), pruned_OI)

    def fit_layer(self, layer: Layer) -> dict[str, Edit]:
        """Other masks, with as many zeros in all."""
        specs = [(one.spec, one.budget) for one in layer.matrices.values()]
        total = sum(self.planned(spec.outputs, spec.inputs, budget) for spec, budget in specs)
        if not total:
            return {}
        choices = {name: _Choice(one, self.rows) for name, one in layer.matrices.items()}
        weights = sum(spec.count for spec, _ in specs)
        energies = [float(one.float().square().sum()) for one in layer.targets]
        optimizer = torch.optim.Adam([one.logits_RD for one in choices.values()], lr=self.rate)
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epochs):
            for batch in torch.randperm(len(layer.calls), generator=generator).tolist():
                with torch.enable_grad():
                    masked = {name: one.masked() for name, one in choices.items()}
                    lost = (layer.output(batch, masked).float() - layer.targets[batch].float()).square().sum()
                    sparsity = sum(one.shares_O().sum() * one.inputs for one in choices.values()) / weights
                    loss = lost / energies[batch] + self.penalty * (sparsity * weights / total - 1) ** 2
                    loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
        return _exact(choices, total)


class _Choice:
    """The distribution over sparsities for the rows of a matrix, R x D (R is 1 for all rows alike)."""

    def __init__(self, solved: Solved, rows: bool) -> None:
        self.dense_OI = solved.dense_OI
        outputs, self.inputs = self.dense_OI.shape
        device = self.dense_OI.device
        score_OI = scores.wanda(Matrix(solved.spec.name, self.dense_OI), solved.stats)
        self.rank_OI = score_OI.argsort(dim=1, stable=True).argsort(dim=1)
        self._candidate_D = torch.linspace(0, 1, CANDIDATES, device=device)
        # the first candidate under which a weight of that rank goes
        self._first_OI = torch.bucketize((self.rank_OI + 0.5) / self.inputs, self._candidate_D)
        bell_D = -((self._candidate_D - solved.budget.sparsity) / SPREAD).square() / 2
        self.logits_RD = bell_D.repeat(outputs if rows else 1, 1).requires_grad_()

    def shares_O(self) -> torch.Tensor:
        """The expected sparsity of every row."""
        return (self.logits_RD.softmax(1) @ self._candidate_D).expand(len(self.dense_OI))

    def masked(self) -> torch.Tensor:
        """The weights without those that go; gradients pass as if each were kept with its probability."""
        above_RD = self.logits_RD.softmax(1).flip(1).cumsum(1).flip(1)
        chance_OI = above_RD.expand(len(self.dense_OI), -1).gather(1, self._first_OI)
        gone_OI = (chance_OI >= self.shares_O()[:, None]).to(chance_OI.dtype)
        return self.dense_OI * (1 - (gone_OI - chance_OI).detach() - chance_OI)


def _exact(choices: dict[str, _Choice], total: int) -> dict[str, Edit]:
    """The masks of the learnt sparsities, all moved by the same share so that `total` weights go."""
    shares_N = torch.cat([one.shares_O().detach().double().cpu() for one in choices.values()])
    sizes_N = torch.cat([torch.full((len(one.dense_OI),), one.inputs, dtype=torch.float64) for one in choices.values()])
    found_N = counts(sizes_N, total, lambda level: shares_N + level)
    edits = {}
    for (name, one), count_O in zip(
        choices.items(), found_N.split([len(one.dense_OI) for one in choices.values()]), strict=True
    ):
        pruned_OI = one.rank_OI < count_O.to(one.rank_OI.device)[:, None]
        edits[name] = Edit(one.dense_OI.masked_fill(pruned_OI, 0), pruned_OI)
    return edits
