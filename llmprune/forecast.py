"""What a run will need, said before it starts: measured on one layer and one batch, and scaled up."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from llmprune.arch.discover import Unit
from llmprune.checkpoint.output import JOIN_BYTES
from llmprune.engine import schedule
from llmprune.engine.share import Share
from llmprune.engine.suspend import Calls
from llmprune.linalg import output_energy
from llmprune.memory import Meter, give_back, within_reach
from llmprune.plan import Plan
from llmprune.statistics import DRIFT, MOMENTS, Stats, of_text
from llmprune.types import Matrix, MatrixSpec, Method
from llmprune.weights import Weights, read_matrix

DISK = 400e6  # bytes a second, written and compared: not measured beforehand
USABLE = 0.9  # of the free memory: the rest is for what is not foreseen
COPIES = 2  # of the hidden states: what entered the model stays alive in its frame, beside the current ones


@dataclass(frozen=True)
class Forecast:
    """Peak memory (bytes allocated by the process, on the device of the forward passes) and time of a way to run."""

    schedule: str
    batch_size: int
    memory: int
    seconds: float
    free: int

    @property
    def fits(self) -> bool:
        return self.memory <= USABLE * self.free

    def __str__(self) -> str:
        return (
            f"about {_duration(self.seconds)} and {self.memory / 2**30:.2f} GiB at peak, of {self.free / 2**30:.1f} GiB "
            f"free; schedule {self.schedule}, batches of {self.batch_size}"
        )


def as_record(forecast: Forecast | None) -> dict[str, Any] | None:
    """For the report."""
    return None if forecast is None else dataclasses.asdict(forecast)


@dataclass
class Measured:
    """What one layer costs: seconds for one batch (`forward`, `sums`) or at all, and bytes beyond the layer itself."""

    load_s: float = 0.0
    forward_s: float = 0.0
    sums_s: float = 0.0
    solve_s: float = 0.0
    entered: int = 0  # in use when the layer's weights are there
    forward: int = 0  # on top of that while a batch passes
    observed: int = 0  # while it is measured, the statistics apart
    sums: int = 0  # all statistics of the layer
    solving: int = 0


class Probe:
    """Prunes nothing: passes one batch up to the largest layer, and measures there (see `engine.schedule.Work`)."""

    reconstructs = False

    def __init__(self, plan: Plan, weights: Weights, method: Method, meter: Meter, *, all_experts: bool) -> None:
        self.kinds, self.all_experts = method.needs - {DRIFT} or frozenset({MOMENTS}), all_experts
        self._plan, self._weights, self._method, self._meter = plan, weights, method, meter
        self.unit = max(plan.chosen_units(), key=lambda unit: _chosen(plan, unit))
        self.found = Measured()
        self._since, self._passing, self._done = 0.0, False, False

    def run_on(self, model: PreTrainedModel, batch: Any) -> Measured:
        """`batch`: keyword arguments of the model."""
        schedule.run(model, self._plan.units, Share.alone([batch]), "layer", self)
        give_back()
        return self.found

    def run_without_data(self) -> Measured:
        self.enter(self.unit)
        self._solve(self.unit, {})
        self.leave(self.unit)
        return self.found

    def enter(self, unit: Unit) -> None:
        self._since = time.perf_counter()
        self._weights.load(unit)
        if unit is self.unit:
            self.found.load_s = self._seconds()
            self._start()

    def enter_dense(self, unit: Unit) -> None:
        raise AssertionError("a probe has no dense stream")

    def wanted(self, unit: Unit) -> set[str]:
        chosen = {spec.name for spec in self._plan.chosen(unit)}
        return chosen if unit is self.unit and not self.found.solve_s else set()

    def solve(self, unit: Unit, stats: dict[str, Stats], transposed: dict[str, bool]) -> None:
        distinct = {id(one): one for one in stats.values()}.values()
        self.found.sums = sum(tensor.nbytes for one in distinct for tensor in one.tensors())
        self.found.observed = max(self._peak() - self.found.sums, 0)
        with torch._C.DisableTorchFunction():
            for one in distinct:
                x_TI = torch.ones(one.tokens, one.width, device=next(unit.module.parameters()).device)
                self._start()
                Stats(one.width, self.kinds, x_TI.device).update(x_TI)
                self.found.sums_s += self._seconds()
            self._solve(unit, {spec.name: (stats[spec.name], transposed[spec.name]) for spec in self._in(unit, stats)})

    def reconstruct(self, unit: Unit, calls: Calls, targets: list[torch.Tensor]) -> bool:
        raise AssertionError("a probe fits nothing")

    def finish(self, unit: Unit) -> None:
        if unit is self.unit and not self._passing:
            self._passing = True
            self._start()

    def leave(self, unit: Unit) -> None:
        if unit is self.unit:
            self.found.forward_s = self._seconds()
            self.found.forward = self._peak()
            self._done = True
        self._weights.free(unit)

    def complete(self) -> bool:
        return self._done

    def _in(self, unit: Unit, stats: dict[str, Stats]) -> Iterator[MatrixSpec]:
        return (spec for spec in unit.matrices if spec.name in stats)

    def _solve(self, unit: Unit, seen: dict[str, tuple[Stats, bool]]) -> None:
        """Solve the most expensive matrix, and scale its time up to the layer's."""
        if not seen and of_text(self._method.needs):
            return  # the batch went to other experts than those that are pruned
        specs = [spec for spec in self._plan.chosen(unit) if spec.name in seen or not seen]
        costs = {spec: _cost(spec, seen[spec.name][0].width if seen else 1) for spec in specs}
        spec = max(costs, key=lambda one: costs[one])
        stats, transposed = seen.get(spec.name, (None, bool(spec.transposed)))
        dense_OI = read_matrix(self._weights, unit, dataclasses.replace(spec, transposed=transposed))
        self._start()
        self._method.solve(Matrix(spec.name, dense_OI), stats, self._plan.budgets[spec.name])
        if stats is not None and stats.has_gram:
            output_energy(dense_OI, stats.gram_lower_II)
        taken = self._seconds()
        self.found.solving = self._peak() + 2 * dense_OI.nbytes  # as read, and its edit
        self.found.solve_s = taken * sum(costs.values()) / costs[spec]

    def _start(self) -> None:
        self._meter.reset()
        self.found.entered = self.found.entered or self._meter.now()
        self._before, self._since = self._meter.now(), time.perf_counter()

    def _seconds(self) -> float:
        self._meter.wait()
        return time.perf_counter() - self._since

    def _peak(self) -> int:
        return max(self._meter.peak() - self._before, 0)


@dataclass(frozen=True)
class Situation:
    """What a forecast depends on besides the layer: the model, the text and the method."""

    plan: Plan
    method: Method
    epochs: int
    tokens: list[int]  # in each batch, as cut for `batch_size`
    batch_size: int
    hidden: int  # bytes of one token's hidden state
    layer: int  # bytes of the largest layer, as it is computed with
    stored: int  # bytes of the whole checkpoint
    processes: int = 1

    def forecast(self, found: Measured, unit: Unit, how: str, batch_size: int, device: torch.device) -> Forecast:
        """Scale what one batch of one layer took up to all of them."""
        layers = sum(_chosen(self.plan, one) for one in self.plan.chosen_units()) / _chosen(self.plan, unit)
        batches = sum(self.tokens) / self.tokens[0] if self.tokens else 0.0
        beside = DRIFT in self.method.needs or self.epochs > 0
        forwards = (2 if how == "layer" else 1) + beside + (3 * self.epochs + 1 if self.epochs else 0)
        drift = 3 if DRIFT in self.method.needs else 1  # its product is no half of a symmetric one
        each = batches * (forwards * found.forward_s + drift * found.sums_s) + found.solve_s / self.processes
        seconds = layers * (each + found.load_s) + 2 * self.stored / DISK
        return Forecast(how, batch_size, self._memory(found, how, batch_size, beside), seconds, within_reach(device))

    def _memory(self, found: Measured, how: str, batch_size: int, beside: bool) -> int:
        smaller = batch_size / self.batch_size
        tokens = sum(self.tokens)
        batches = tokens / self.tokens[0] if self.tokens else 0.0
        waiting = COPIES * (1 + beside) * tokens * self.hidden
        inside = found.forward * smaller
        sums = found.sums * (2 if DRIFT in self.method.needs else 1)
        if how == "module":
            # every batch stands inside the layer
            inside = found.forward * batches
        if beside:
            # the dense model's inputs of every matrix, and its outputs
            waiting += int(found.observed * batches)
        fitting = 4 * self.layer + 3 * found.forward * smaller if self.epochs else 0
        phases = (
            found.observed * smaller + sums,
            sums + found.solving + (inside if how == "module" else 0),
            inside,
            self.layer,  # written: one copy for the file
            fitting,
        )
        joining = found.entered - self.layer + min(self.stored, JOIN_BYTES)
        return int(max(found.entered + waiting + max(phases), joining))

    def choose(
        self, found: Measured, unit: Unit, how: str, device: torch.device, *, schedules: bool, sizes: bool
    ) -> Forecast:
        """The first way that fits, beginning with `how`; the leanest if none does.

        `schedules`, `sizes`: whether the schedule and the batch size may be changed.
        """
        ways = [how, "layer"] if schedules and how != "layer" else [how]
        halves = [self.batch_size]
        while sizes and halves[-1] > 1:
            halves.append(halves[-1] // 2)
        forecasts = [self.forecast(found, unit, way, size, device) for size in halves for way in ways]
        return next((one for one in forecasts if one.fits), min(forecasts, key=lambda one: one.memory))


def _chosen(plan: Plan, unit: Unit) -> int:
    return sum(spec.count for spec in plan.chosen(unit))


def _cost(spec: MatrixSpec, width: int) -> float:
    return spec.count * width + width**3 / 3


def _duration(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
