"""SparseLLM: the matrices of an MLP pruned by turns, with what passes between them free to move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from llmprune.arch.feedforward import Feedforward, feedforward
from llmprune.engine.layer import Layer
from llmprune.kernels.gram import cross_update_
from llmprune.linalg import inverse
from llmprune.methods.weight.sparsegpt import SparseGPT
from llmprune.solvers.retarget import retarget
from llmprune.statistics import GRAM, Stats
from llmprune.types import Budget, Edit, Matrix, RunError

# how far what down is fed may be from the formula of the MLP, relative to its norm: rounding of half precision
ROUNDING = 1e-2
# of the gradient steps on what gate puts out
STEPS, RATE = 2, 0.01


@dataclass(frozen=True)
class SparseLLM:
    """SparseGPT, then the MLP of each layer by alternating minimisation over its weights and its inner values.

    Bai et al. 2024, "SparseLLM: Towards Global Pruning of Pre-trained Language Models" (arXiv:2402.17946), section 4. With
    y what the dense MLP puts out on its present inputs x, and free values s, z, p for what gate, up and down get to
    see, minimise |y - W_d p|² + |p - act(s) z|² + |z - W_u x|² + |s - W_g x|², each of `rounds` times: every matrix
    is refitted to its target by least squares and pruned by SparseGPT on its Gram matrix; then p in closed form, z
    in closed form, s by two gradient steps. All terms weigh alike (as the reference's three fives do). Deviations: the
    round whose MLP comes closest to y is kept, the start by SparseGPT alone included; least squares are damped in
    place of a pseudo-inverse; all layers are treated alike. An MLP of experts, or of another form, stays as SparseGPT
    leaves it.

    Memory: for all calibration tokens of one layer, the inputs and outputs of the MLP and four times its inner values in
    float32.

    `damping`: of SparseGPT and the least squares.
    """

    rounds: int = 4
    damping: float = 0.01

    kind: ClassVar[str] = "weight"
    needs: ClassVar[frozenset[str]] = frozenset({GRAM})
    patterns: ClassVar[tuple[str, ...]] = ("unstructured", "N:M")
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2402.17946"

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds {self.rounds} must be at least 1")
        SparseGPT(self.damping)

    def planned(self, outputs: int, inputs: int, budget: Budget) -> int:
        return SparseGPT().planned(outputs, inputs, budget)

    def solve(self, matrix: Matrix, stats: Stats | None, budget: Budget) -> Edit:
        return SparseGPT(self.damping).solve(matrix, stats, budget)

    def fit_layer(self, layer: Layer) -> dict[str, Edit]:
        """Other weights and masks for the MLP; none where it has no such form, or is not pruned as a whole."""
        form = feedforward(layer.module)
        if form is None:
            return {}
        block = _Block(layer, form, self.damping)
        if not block.whole:
            return {}
        best, edits = block.error(block.present()), {}
        for round_ in range(self.rounds):
            found = block.prune()
            weights = {name: edit.weight_OI.masked_fill(edit.pruned_OI, 0) for name, edit in found.items()}
            error = block.error(weights)
            if error < best:
                best, edits = error, found
            if round_ + 1 < self.rounds:
                block.move(weights)
        return edits


class _Block:
    """An MLP with its free values, batch by batch: x and y, tokens x hidden; s, z and p, tokens x channels."""

    def __init__(self, layer: Layer, form: Feedforward, damping: float) -> None:
        self._layer, self._form, self._damping = layer, form, damping
        prefix = layer.unit.prefix
        paths = [form.up, form.down] if form.gate is None else [form.gate, form.up, form.down]
        self._names = [f"{prefix}{path}.weight" for path in paths]
        *self._first, self._down = self._names
        self.whole = all(name in layer.matrices and layer.matrices[name].budget.sparsity > 0 for name in self._names)
        if not self.whole:
            return
        self._bias = {
            name: getattr(layer.module.get_submodule(path), "bias", None)
            for name, path in zip(self._names, paths, strict=True)
        }
        dense = {name: layer.matrices[name].dense_OI for name in self._names}
        self._x = [one.float() for one in layer.inputs(self._first[0])]
        pairs = [self._ahead(dense, x_TD) for x_TD in self._x]
        self._s, self._z = [one for one, _ in pairs], [one for _, one in pairs]
        self._p = [form.inner(s_TC, z_TC) for s_TC, z_TC in pairs]
        self._y = [self._apply(dense, self._down, p_TC) for p_TC in self._p]
        self._check()

    def _check(self) -> None:
        """Whether the formula is what the layer computes, with its present weights."""
        present = self.present()
        seen_TC = next(self._layer.inputs(self._down)).float()
        found_TC = self._form.inner(*self._ahead(present, self._x[0]))
        if seen_TC.shape != found_TC.shape or (seen_TC - found_TC).norm() > ROUNDING * seen_TC.norm():
            raise RunError(f"the MLP of {self._layer.unit.name} does not compute what its modules say; use sparsegpt")

    def present(self) -> dict[str, torch.Tensor]:
        """The weights as they are in the layer."""
        return {name: self._layer.present(name) for name in self._names}

    def error(self, weights: dict[str, torch.Tensor]) -> float:
        """|y - MLP(x)|² over all tokens."""
        return sum(
            float(
                (y_TD - self._apply(weights, self._down, self._form.inner(*self._ahead(weights, x_TD)))).square().sum()
            )
            for x_TD, y_TD in zip(self._x, self._y, strict=True)
        )

    def prune(self) -> dict[str, Edit]:
        """Every matrix refitted to its target and pruned."""
        firsts = [[s_TC, z_TC] if s_TC is not None else [z_TC] for s_TC, z_TC in zip(self._s, self._z, strict=True)]
        targets = [[torch.cat(one, 1)] for one in firsts] if self._form.joined else firsts
        stats = self._gram(self._x)
        edits = {
            name: self._solve(name, stats, self._x, [one[place] for one in targets])
            for place, name in enumerate(self._first)
        }
        return edits | {self._down: self._solve(self._down, self._gram(self._p), self._p, self._y)}

    def move(self, weights: dict[str, torch.Tensor]) -> None:
        """The free values, for these weights."""
        down_OC = weights[self._down]
        system_CC = inverse(down_OC.T @ down_OC, 1.0)
        for batch, (x_TD, y_TD) in enumerate(zip(self._x, self._y, strict=True)):
            s_TC, z_TC = self._s[batch], self._z[batch]
            bias = self._bias[self._down]
            wanted_TD = y_TD if bias is None else y_TD - bias.float()
            p_TC = (wanted_TD @ down_OC + self._form.inner(s_TC, z_TC)) @ system_CC
            ahead_s_TC, ahead_z_TC = self._ahead(weights, x_TD)
            if s_TC is None or ahead_s_TC is None:
                z_TC = self._descend(z_TC, ahead_z_TC, p_TC, 1.0)
            else:
                a_TC = self._form.activation(s_TC)
                z_TC = (a_TC * p_TC + ahead_z_TC) / (a_TC.square() + 1)
                s_TC = self._descend(s_TC, ahead_s_TC, p_TC, z_TC)
            self._s[batch], self._z[batch], self._p[batch] = s_TC, z_TC, p_TC

    def _descend(
        self, value_TC: torch.Tensor, ahead_TC: torch.Tensor, p_TC: torch.Tensor, factor: torch.Tensor | float
    ) -> torch.Tensor:
        """Steps down |p - act(value) factor|² + |value - ahead|²."""
        for _ in range(STEPS):
            with torch.enable_grad():
                leaf = value_TC.detach().requires_grad_()
                lost = (p_TC - self._form.activation(leaf) * factor).square().sum() + (leaf - ahead_TC).square().sum()
                (gradient_TC,) = torch.autograd.grad(lost, leaf)
            value_TC = value_TC - RATE * gradient_TC
        return value_TC

    def _ahead(self, weights: dict[str, torch.Tensor], x_TD: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """What gate and up put out."""
        found = [self._apply(weights, name, x_TD) for name in self._first]
        if self._form.joined:
            found = list(found[0].chunk(2, 1))
        return (found[0], found[1]) if len(found) == 2 else (None, found[0])

    def _apply(self, weights: dict[str, torch.Tensor], name: str, x_TI: torch.Tensor) -> torch.Tensor:
        bias = self._bias[name]
        return torch.nn.functional.linear(x_TI, weights[name], None if bias is None else bias.float())

    def _gram(self, inputs: Sequence[torch.Tensor]) -> Stats:
        stats = Stats(inputs[0].shape[1], frozenset({GRAM}), inputs[0].device)
        for x_TI in inputs:
            stats.update(x_TI)
        return stats

    def _solve(self, name: str, stats: Stats, inputs: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> Edit:
        """The matrix that maps inputs to targets best, pruned."""
        solved = self._layer.matrices[name]
        pull_OI = torch.zeros_like(solved.dense_OI)
        for x_TI, target_TO in zip(inputs, targets, strict=True):
            cross_update_(pull_OI, target_TO - self._apply({name: solved.dense_OI}, name, x_TI), x_TI)
        fitted_OI = retarget(solved.dense_OI, pull_OI, stats.scaled(self._damping), 1.0)
        edit = SparseGPT(self._damping).solve(Matrix(name, fitted_OI), stats, solved.budget)
        # its loss is measured from the refitted weights
        return replace(edit, loss=None)
