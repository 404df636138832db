"""How a budget is spread over the matrices of a model. A new allocator is a file and a line here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import NamedTuple

import torch

from llmprune.engine.divergence import Variant
from llmprune.recipe import nearest
from llmprune.statistics import Stats
from llmprune.types import Budget, MatrixSpec, UserError

# Goes through the model once and yields every matrix with a float32 value for each weight, outputs x inputs.
Values = Callable[[], Iterable[tuple[MatrixSpec, torch.Tensor]]]
# The same for one layer, with the statistics of the inputs; may be called again. A matrix that no token reached
# is not among them.
Measured = Callable[[], Iterable[tuple[MatrixSpec, torch.Tensor, Stats]]]
# Runs the calibration text through the model, with statistics of these kinds; calls back with every layer's
# number and matrices, in order.
Measure = Callable[[frozenset[str], Callable[[int, Measured], None]], None]
# How far each of some variants is from the model on so many sequences of the calibration text (see `engine.divergence`).
Diverge = Callable[[Sequence[Variant], int], list[float]]


@dataclass(frozen=True)
class Dense:
    """The model before pruning, as an allocator sees it: the chosen matrices by layer, and ways to read them.

    `scores` is as `weights`, with what each weight matters in place of its value.
    """

    layers: list[list[MatrixSpec]]
    weights: Values
    scores: Values
    measure: Measure
    diverge: Diverge

    @property
    def specs(self) -> list[MatrixSpec]:
        return [spec for layer in self.layers for spec in layer]

    def by_layer(self, values: list[float]) -> dict[str, float]:
        """One value a layer, for each of its matrices by name."""
        return {spec.name: value for layer, value in zip(self.layers, values, strict=True) for spec in layer}


Allocator = Callable[[Dense, Budget], dict[str, Budget]]


class Entry(NamedTuple):
    """Where an allocator is, and whether it measures, which takes calibration text."""

    path: str
    measures: bool = False


ALLOCATORS = {
    "uniform": Entry("llmprune.allocation.uniform:uniform"),
    "global": Entry("llmprune.allocation.global_score:global_score"),
    "arithmetic": Entry("llmprune.allocation.arithmetic:arithmetic"),
    "alphapruning": Entry("llmprune.allocation.alphapruning:alphapruning"),
    "owl": Entry("llmprune.allocation.owl:owl", measures=True),
    "dlp": Entry("llmprune.allocation.dlp:dlp", measures=True),
    "dynamic": Entry("llmprune.allocation.dynamic:dynamic", measures=True),
    "evopress": Entry("llmprune.allocation.evopress:evopress", measures=True),
    "error": Entry("llmprune.allocation.error:error", measures=True),
}


def entry(name: str) -> Entry:
    """The line of the table for a name; raises UserError."""
    if name not in ALLOCATORS:
        raise UserError(f"unknown allocation {name!r}{nearest(name, list(ALLOCATORS))}")
    return ALLOCATORS[name]


def allocator(name: str) -> Allocator:
    """The allocator behind a name; raises UserError."""
    module, _, attribute = entry(name).path.partition(":")
    found: Allocator = getattr(import_module(module), attribute)
    return found
