"""A pass over the dense model that prunes nothing: what allocators measure with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from llmprune.allocation import Measured
from llmprune.arch.discover import Unit, find_units
from llmprune.engine import schedule
from llmprune.engine.divergence import Variant, divergences
from llmprune.engine.share import Share
from llmprune.engine.suspend import Call
from llmprune.engine.trunk import Trunk
from llmprune.plan import Plan
from llmprune.statistics import Stats
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
        self._wanted = {
            unit.name: {spec.name for spec in unit.matrices if spec.name in plan.budgets} for unit in plan.units
        }
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
                    yield laid_out, read_matrix(unit, laid_out), stats[spec.name]

        with torch._C.DisableTorchFunction():
            self._look(self._numbers[unit.name], matrices)

    def reconstruct(self, unit: Unit, calls: list[tuple[Call, torch.Tensor]], targets: list[torch.Tensor]) -> bool:
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
