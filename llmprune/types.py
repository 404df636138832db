"""The vocabulary of the project: what may be pruned, how much, and what a method answers.

Shape suffixes used throughout: O outputs of a matrix, I inputs, T tokens, E experts,
G groups that are selected in independently. `weight_OI` is always outputs x inputs,
whatever the layout of the parameter it came from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

    from llmprune.statistics import Stats


class UserError(Exception):
    """The user's input is wrong. Found before work starts; nothing has been written (exit code 2)."""


class RunError(Exception):
    """The run failed after it started. What is finished stays on disk for `--resume` (exit code 1)."""


@dataclass(frozen=True)
class Pattern:
    """Where zeros may lie along the inputs of a matrix.

    `keep` of every `group` consecutive inputs stay; both zero means unstructured.
    """

    keep: int = 0
    group: int = 0

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read `"2:4"` (2 kept of every 4) or `"unstructured"`; raises UserError for anything else."""
        if text == "unstructured":
            return cls()
        match = re.fullmatch(r"(\d{1,6}):(\d{1,6})", text)  # Python refuses numbers of thousands of digits
        if not match:
            raise UserError(f"pattern {text!r} is not understood; write KEEP:GROUP, for example 2:4")
        keep, group = int(match[1]), int(match[2])
        if not 0 < keep <= group:
            raise UserError(f"pattern {text!r} must keep at least 1 and at most {group} of every {group} weights")
        return cls(keep, group)

    @property
    def structured(self) -> bool:
        return self.group > 0

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}" if self.structured else "unstructured"


UNSTRUCTURED = Pattern()


def as_fraction(given: float | None) -> str:
    """What to write instead of a number that looks like a percentage, as the end of a message."""
    return f" ({given / 100:g} for {given:g} %)" if given is not None and 1 < given < 100 else ""


@dataclass(frozen=True)
class Budget:
    """How much of one matrix to prune: `sparsity` is the fraction of zeros, implied by an N:M `pattern`."""

    sparsity: float
    pattern: Pattern = UNSTRUCTURED

    @classmethod
    def of(cls, sparsity: float | None, pattern: Pattern) -> Budget:
        """Combine what the user gave, checking the range; raises UserError."""
        if pattern.structured:
            return cls(1 - pattern.keep / pattern.group, pattern)
        if sparsity is None or not 0 <= sparsity < 1 or math.isnan(sparsity):
            raise UserError(
                f"sparsity {sparsity} is outside [0, 1): it is the fraction of weights to set to zero{as_fraction(sparsity)}"
            )
        return cls(sparsity)

    def pruned_of(self, count: int) -> int:
        """How many of `count` weights that are selected together become zero."""
        if self.pattern.structured:
            return count // self.pattern.group * (self.pattern.group - self.pattern.keep)
        return math.floor(self.sparsity * count + 0.5)


@dataclass(frozen=True)
class MatrixSpec:
    """One prunable matrix of the model, known before anything runs.

    `parameter` is the name of the parameter that holds it, `index` the slice along its first
    axis if it holds several (fused experts). `transposed`: stored inputs x outputs; None
    when only running the layer will tell.
    """

    parameter: str
    index: int | None
    outputs: int
    inputs: int
    transposed: bool | None

    @property
    def name(self) -> str:
        return self.parameter if self.index is None else f"{self.parameter}[{self.index}]"

    @property
    def count(self) -> int:
        return self.outputs * self.inputs


FISHER_BLOCK = 32  # consecutive weights whose gradients are multiplied with each other


def in_blocks(value: torch.Tensor) -> torch.Tensor:
    """The last axis as two: blocks of `FISHER_BLOCK` consecutive values, the last one filled up with zeros."""
    *others, width = value.shape
    padded = value.new_zeros(*others, -(-width // FISHER_BLOCK) * FISHER_BLOCK)
    padded[..., :width] = value
    found: torch.Tensor = padded.unflatten(-1, (-1, FISHER_BLOCK))
    return found


@dataclass
class Gradient:
    """Gradients of a weight matrix over `samples` sequences, in float32 and of the matrix' own shape.

    `mean_OI`: that of the mean over all tokens. `squares_OI`: sum over the sequences of the square of each one's own.
    `turned_OI`: the Hessian of that mean, for all matrices together, times its gradient; only where it is asked for.
    `blocks_RNBB`: where it is asked for, the sum over the sequences of g g' in every block of `in_blocks`; R rows of N
    blocks, or columns (`by_columns`) where the parameter holds the inputs first.
    """

    mean_OI: torch.Tensor
    squares_OI: torch.Tensor
    samples: int = 0
    turned_OI: torch.Tensor | None = None
    blocks_RNBB: torch.Tensor | None = None
    by_columns: bool = False

    def add(self, gradient_OI: torch.Tensor, share: float) -> None:
        """Take in a sequence that holds that `share` of all tokens."""
        self.mean_OI += share * gradient_OI
        wide_OI = gradient_OI.to(self.squares_OI.dtype)
        self.squares_OI += wide_OI.square()
        if self.blocks_RNBB is not None:
            wide_RNB = in_blocks(wide_OI)
            self.blocks_RNBB.addcmul_(wide_RNB[..., None], wide_RNB[..., None, :])
        self.samples += 1


@dataclass(frozen=True)
class Matrix:
    """A matrix as a method sees it: its name and its float32 weights, outputs x inputs; gradients if it needs them.

    `curvature_OO`: sum over tokens of g g', g being the gradient, with respect to the outputs for that token, of the
    loss summed over the sequence. Only the lower triangle is valid.
    """

    name: str
    weight_OI: torch.Tensor
    gradient: Gradient | None = None
    curvature_OO: torch.Tensor | None = None


@dataclass
class Edit:
    """All a method may say about a matrix: new weights, which of them are pruned, and remarks for the report.

    `loss` is tr(dW G dW'), the squared change of the outputs on the calibration tokens, where the
    method knows it anyway.
    """

    weight_OI: torch.Tensor
    pruned_OI: torch.Tensor
    notes: dict[str, Any] = field(default_factory=dict)
    loss: float | None = None

    @classmethod
    def unchanged(cls, weight_OI: torch.Tensor) -> Edit:
        """What a method answers where nothing is to be pruned."""
        return cls(weight_OI, weight_OI.new_zeros(weight_OI.shape).bool(), loss=0.0)


class Method(Protocol):
    """What every matrix method is: a frozen dataclass whose fields are its recipe keys.

    `needs` names the statistics it reads (see `statistics.Kind`); `planned` is the exact number
    of zeros it will make, so that the result can be checked against the plan.
    """

    kind: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    patterns: ClassVar[tuple[str, ...]]
    output: ClassVar[str]
    paper: ClassVar[str]

    def planned(self, outputs: int, inputs: int, budget: Budget) -> int: ...

    def solve(self, matrix: Matrix, stats: Stats | None, budget: Budget) -> Edit: ...


@runtime_checkable
class Together(Method, Protocol):
    """A method that can also solve several matrices with the same input and budget at once."""

    def solve_together(self, matrices: Sequence[Matrix], stats: Stats | None, budget: Budget) -> list[Edit]: ...


@dataclass
class Outcome:
    """One row of the report: what was planned for a matrix and what became of it."""

    name: str
    shape: tuple[int, int]
    planned: int
    achieved: int
    error: float | None
    error_kind: str
    tokens: int | None
    notes: dict[str, Any] = field(default_factory=dict)
