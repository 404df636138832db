"""A pass over the dense model that prunes nothing: what allocators measure with."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from llmprune.allocation import Measure, Measured, Values
from llmprune.arch.discover import Unit, find_units
from llmprune.engine import schedule
from llmprune.engine.divergence import Variant, divergences
from llmprune.engine.gradient_store import Gradients, with_gradients
from llmprune.engine.share import Share
from llmprune.engine.suspend import Calls
from llmprune.engine.trunk import Trunk
from llmprune.plan import Plan
from llmprune.scores import Score
from llmprune.statistics import OF_WEIGHTS, Stats
from llmprune.temporary import check_room, save
from llmprune.types import MatrixSpec, UserError
from llmprune.weights import Weights, read_matrix


class Measurement:
    """Calls `look` with every layer's matrices and statistics; the engine calls it (see `engine.schedule.Work`)."""

    reconstructs = False

    def __init__(
        self,
        plan: Plan,
        weights: Weights,
        kinds: frozenset[str],
        look: Callable[[int, Measured], None],
        *,
        all_experts: bool,
    ) -> None:
        self.kinds, self.all_experts = kinds, all_experts
        self._units, self._weights, self._look = plan.units, weights, look
        self._numbers = {unit.name: number for number, unit in enumerate(plan.chosen_units())}
        self._wanted = {unit.name: {spec.name for spec in plan.chosen(unit)} for unit in plan.units}
        self._left = {unit.name for unit in plan.chosen_units()}

    def run_on(self, model: nn.Module, share: Share) -> None:
        schedule.run(model, self._units, dataclasses.replace(share, everywhere=True), "layer", self)

    def enter(self, unit: Unit) -> None:
        self._weights.load(unit)

    def enter_dense(self, unit: Unit) -> None:
        self.enter(unit)

    def wanted(self, unit: Unit) -> set[str]:
        return self._wanted[unit.name]

    def solve(self, unit: Unit, stats: dict[str, Stats], transposed: dict[str, bool]) -> None:
        def matrices() -> Iterator[tuple[MatrixSpec, torch.Tensor, Stats]]:
            for spec in unit.matrices:
                if spec.name in stats:
                    laid_out = dataclasses.replace(spec, transposed=transposed[spec.name])
                    yield laid_out, read_matrix(self._weights, unit, laid_out), stats[spec.name]

        with torch._C.DisableTorchFunction():
            self._look(self._numbers[unit.name], matrices)

    def reconstruct(self, unit: Unit, calls: Calls, targets: list[torch.Tensor]) -> bool:
        raise AssertionError("a measurement fits nothing")

    def finish(self, unit: Unit) -> None:
        self._left.discard(unit.name)

    def leave(self, unit: Unit) -> None:
        self._weights.free(unit)

    def complete(self) -> bool:
        return not self._left


def compare(
    model: PreTrainedModel,
    plan: Plan,
    weights: Weights,
    batches: list[dict[str, torch.Tensor]],
    variants: Sequence[Variant],
    sequences: int,
) -> list[float]:
    """How far variants are from the dense model on so many sequences; raises UserError if the head may be among them."""
    units = find_units(model, head=False)
    if len(units) < len(plan.units):
        raise UserError(
            "an allocation that runs the decoder layers takes amounts of them alone: leave out the output head"
        )
    return divergences(Trunk(model, units, batches, weights).first(sequences), variants)


class Scores:
    """What every chosen weight matters in the dense model, by a score.

    One that reads inputs is measured once, and kept on disk as a float32 a weight (TMPDIR); any other is made anew each
    time. `matrices` goes through the weights, `measure` runs the text through the model, `gradients` are taken when
    they are first asked for. `count`: how many weights there are.
    """

    def __init__(
        self, score: Score, count: int, matrices: Values, measure: Measure, gradients: Callable[[], Gradients]
    ) -> None:
        self._count = count
        self._score, self._matrices, self._measure, self._gradients = score, matrices, measure, gradients
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._layers: list[list[MatrixSpec]] = []

    def each(self) -> Iterator[tuple[MatrixSpec, torch.Tensor]]:
        """Every matrix with its scores, outputs x inputs; one that reads inputs has none where no token came."""
        gradients = self._gradients() if self._score.needs & OF_WEIGHTS else None
        kinds = self._score.needs - OF_WEIGHTS
        if not kinds:
            for spec, weight_OI in self._matrices():
                yield spec, self._score.of(with_gradients(gradients, spec, weight_OI))
            return
        if self._folder is None:
            check_room("scores that read inputs take four bytes a weight", 4 * self._count)
            self._folder = tempfile.TemporaryDirectory(prefix="llmprune-scores-")
            self._measure(kinds, lambda number, matrices: self._keep(matrices, gradients))
        for number, specs in enumerate(self._layers):
            stored = load_file(self._path(number))
            yield from ((spec, stored[spec.name]) for spec in specs)

    def _keep(self, matrices: Measured, gradients: Gradients | None) -> None:
        found = {
            spec: self._score.of(with_gradients(gradients, spec, weight_OI), stats).cpu()
            for spec, weight_OI, stats in matrices()
        }
        save({spec.name: one for spec, one in found.items()}, self._path(len(self._layers)))
        self._layers.append(list(found))

    def _path(self, layer: int) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / f"{layer}.safetensors"


def each_matrix(plan: Plan, weights: Weights) -> Iterable[tuple[MatrixSpec, torch.Tensor]]:
    """Every chosen matrix with its weights, one unit in memory at a time."""
    for unit in plan.units:
        weights.load(unit)
        for spec in plan.chosen(unit):
            yield spec, read_matrix(weights, unit, spec)
        weights.free(unit)
