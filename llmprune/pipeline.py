"""The only loop over the layers of a model: measure, solve, check, store."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import torch
from torch import nn

from llmprune.arch.discover import Unit
from llmprune.engine import schedule
from llmprune.engine.gradient_store import Gradients, with_gradients
from llmprune.engine.layer import Layer, Solved
from llmprune.engine.reconstruct import reconstruct
from llmprune.engine.share import Share
from llmprune.engine.suspend import Calls, first_tensor
from llmprune.linalg import output_energy
from llmprune.memory import give_back
from llmprune.methods.weight.magnitude import Magnitude
from llmprune.plan import Plan, check_pattern
from llmprune.progress import Reporter
from llmprune.recipe import Recipe
from llmprune.statistics import DRIFT, MOMENTS, OF_WEIGHTS, Stats, of_text
from llmprune.types import Budget, Edit, Matrix, MatrixSpec, Method, Outcome, RunError, Together, UserError
from llmprune.weights import Weights, read_matrix, write_matrix

UNUSED = "no calibration token passed through it"
# devices that solving one matrix keeps busy: there, several at once take memory and gain nothing
FILLED = ("cpu",)


def fits_layers(method: Method) -> bool:
    """Whether a method goes over all matrices of a layer together once they are solved (`fit_layer`)."""
    return hasattr(method, "fit_layer")


def schedule_of(recipe: Recipe, method: Method, epochs: int) -> str:
    """The schedule that a recipe asks for, or the one that goes with its method."""
    by_default = "module" if DRIFT in method.needs or epochs > 0 or fits_layers(method) else "layer"
    return by_default if recipe.engine.schedule == "auto" else recipe.engine.schedule


class Pruning:
    """One run over a model: the engine calls it at every unit (see `engine.schedule.Work`)."""

    def __init__(
        self,
        plan: Plan,
        recipe: Recipe,
        method: Method,
        weights: Weights,
        reporter: Reporter,
        share: Share,
        epochs: int = 0,
        gradients: Gradients | None = None,
    ) -> None:
        # a method that reads gradients alone still learns from the forward how matrices lie and which are reached
        self.kinds = method.needs - OF_WEIGHTS or frozenset({MOMENTS})
        self._gradients = gradients
        self.all_experts = recipe.calibration.all_experts
        self.reconstructs = epochs > 0 or fits_layers(method)
        self._epochs = epochs
        self._solved: dict[str, Solved] = {}  # of the present layer, for a method that goes over it as a whole
        self._fits: dict[str, float] | None = None
        self.schedule = schedule_of(recipe, method, epochs)
        self._plan, self._recipe, self._method = plan, recipe, method
        self._weights, self._reporter, self._share = weights, reporter, share
        self._finished = weights.done() & {unit.name for unit in plan.units}
        self._wanted = {unit.name: {spec.name for spec in plan.chosen(unit)} for unit in plan.units}
        for name in self._finished:
            self._wanted[name] = set()
        self._loaded: set[str] = set()
        self._outcomes: list[Outcome] = []
        self._seconds: dict[str, float] = {}
        self._left_alone: dict[str, str] = {}
        self._transposed: dict[str, bool] = {}

    def run_on(self, model: nn.Module) -> None:
        """Prune with calibration: drive the batches through the model by the recipe's schedule."""
        schedule.run(model, self._plan.units, self._share, self.schedule, self)

    def run_without_data(self) -> None:
        """Prune unit by unit, for a method that needs no statistics."""
        for unit in self._plan.units:
            if unit.name not in self._finished:
                self.enter(unit)
                for spec in self._open(unit):
                    self._prune(unit, [spec], None)
                self.finish(unit)
                self.leave(unit)

    # What the engine calls back.

    def enter(self, unit: Unit) -> None:
        if unit.name not in self._loaded:
            self._weights.load(unit)
            self._loaded.add(unit.name)

    def enter_dense(self, unit: Unit) -> None:
        # what a unit borrows may be pruned already
        if unit.name in self._finished or unit.borrowed:
            self._weights.load(unit, dense=True)
        else:
            self.enter(unit)

    def wanted(self, unit: Unit) -> set[str]:
        return self._wanted[unit.name]

    def solve(self, unit: Unit, stats: dict[str, Stats], transposed: dict[str, bool]) -> None:
        # solvers make many small calls, which the modes that watch the forward would slow down
        with torch._C.DisableTorchFunction():
            specs = [self._settle_layout(one, transposed[one.name]) for one in self._open(unit) if one.name in stats]
            for together in self._groups(unit, specs, stats):
                # taken out, so that the last matrix that shares these statistics frees them
                one, *_ = [stats.pop(spec.name) for spec in together]
                if one.whole:
                    self._prune(unit, together, one)
            self._exchange(unit, specs)

    def reconstruct(self, unit: Unit, calls: Calls, targets: list[torch.Tensor]) -> bool:
        """Go over the solved matrices of `unit`, as the method and `reconstruct` ask, as they will be stored."""
        if not self._outcomes:
            return False
        if self._solved:
            self._fit_layer(unit, Layer(unit, self._solved, [call for call, _ in calls], targets))
            self._solved = {}
            calls = (
                [(call, first_tensor(unit.module(*call[0], **call[1]))) for call, _ in calls] if self._epochs else []
            )
        if self._epochs:
            self._fit_weights(unit, calls, targets)
        return True

    def _fit_layer(self, unit: Unit, layer: Layer) -> None:
        """Take what the method makes of the layer as a whole: as many zeros, if elsewhere."""
        assert fits_layers(self._method)
        edits: dict[str, Edit] = self._method.fit_layer(layer)  # type: ignore[attr-defined]
        rows = {row.name: place for place, row in enumerate(self._outcomes)}
        before = sum(self._outcomes[rows[name]].planned for name in edits)
        after = sum(int(edit.pruned_OI.sum()) for edit in edits.values())
        if before != after:
            raise RunError(f"{unit.name}: planned {before} zeros, the method made {after}")
        for name, edit in edits.items():
            solved, old = layer.matrices[name], self._outcomes[rows[name]]
            edit.notes = {key: one for key, one in old.notes.items() if key == "statistics"} | edit.notes
            planned = int(edit.pruned_OI.sum())
            self._outcomes[rows[name]] = self._store(unit, solved.spec, solved.dense_OI, edit, planned, solved.stats)

    def _fit_weights(self, unit: Unit, calls: Calls, targets: list[torch.Tensor]) -> None:
        """Fit the kept weights to the dense outputs by gradient."""
        names = {row.name.partition("[")[0].removeprefix(unit.prefix): None for row in self._outcomes}
        places = {name: self._weights.places(unit, unit.prefix + name) for name in names}
        kept = {name: ones[-1].to(ones[0].device) != 0 for name, ones in places.items()}
        storage = {name: self._weights.storage_dtype(unit.prefix + name) for name in names}
        before, after = reconstruct(
            unit.module,
            places,
            kept,
            storage,
            calls,
            targets,
            epochs=self._epochs,
            seed=self._recipe.seed,
            share=self._share,
        )
        self._fits = {"before": before, "after": after}
        self._reporter.say(f"{unit.name}: output error {before:.4f} of its energy, {after:.4f} when fitted")

    def finish(self, unit: Unit) -> None:
        if unit.name in self._finished:
            return
        for spec in self._open(unit):
            self._unreached(unit, spec)
        order = {spec.name: place for place, spec in enumerate(unit.matrices)}
        rows = [dataclasses.asdict(one) for one in sorted(self._outcomes, key=lambda one: order[one.name])]
        record = {"tensors": rows, "seconds": self._seconds, "left_alone": self._left_alone, "fit": self._fits}
        self._weights.commit(unit, record)
        self._outcomes, self._seconds, self._left_alone, self._fits = [], {}, {}, None
        self._finished.add(unit.name)
        give_back()

    def leave(self, unit: Unit) -> None:
        self._weights.free(unit)
        self._loaded.discard(unit.name)
        give_back()

    def complete(self) -> bool:
        return len(self._finished) == len(self._plan.units)

    # One matrix.

    def _open(self, unit: Unit) -> Iterator[MatrixSpec]:
        wanted = self._wanted[unit.name]
        return (spec for spec in list(unit.matrices) if spec.name in wanted)

    def _settle_layout(self, spec: MatrixSpec, transposed: bool) -> MatrixSpec:
        """Confirm, or learn, which axis of the parameter holds the inputs."""
        self._transposed[spec.parameter] = transposed
        if spec.transposed is None:
            outputs, inputs = (spec.inputs, spec.outputs) if transposed else (spec.outputs, spec.inputs)
            spec = dataclasses.replace(spec, transposed=transposed, outputs=outputs, inputs=inputs)
            try:
                check_pattern(spec, self._plan.budgets[spec.name], self._method)
            except UserError as error:
                raise RunError(str(error)) from error
        if spec.transposed != transposed:
            raise RunError(f"{spec.name} is used the other way round than its class says; leave it out with --ignore")
        return spec

    def _unreached(self, unit: Unit, spec: MatrixSpec) -> None:
        """A matrix that the forward never used: an unseen expert follows the recipe, others stay dense."""
        if spec.index is not None and self._recipe.calibration.unseen == "error":
            raise RunError(f"{spec.name}: {UNUSED}; give more text, or set calibration.unseen=magnitude")
        if spec.transposed is None and spec.parameter in self._transposed:
            # its siblings in the same parameter were seen
            spec = self._settle_layout(spec, self._transposed[spec.parameter])
        if spec.index is None or spec.transposed is None:
            self._left_alone[spec.name] = UNUSED
            self._wanted[unit.name].discard(spec.name)
            del self._plan.budgets[spec.name]
            self._reporter.warn(f"{spec.name} is left dense: {UNUSED}")
        else:
            self._prune(unit, [spec], None)

    def _groups(self, unit: Unit, specs: list[MatrixSpec], stats: dict[str, Stats]) -> list[list[MatrixSpec]]:
        """The matrices that are solved at once: those that share an input and a budget, where method and device gain."""
        if not isinstance(self._method, Together) or next(unit.module.parameters()).device.type in FILLED:
            return [[spec] for spec in specs]
        groups: dict[tuple[int, Budget], list[MatrixSpec]] = {}
        for spec in specs:
            groups.setdefault((id(stats[spec.name]), self._plan.budgets[spec.name]), []).append(spec)
        return list(groups.values())

    def _prune(self, unit: Unit, specs: list[MatrixSpec], stats: Stats | None) -> None:
        started = time.perf_counter()
        give_back()  # what the forward, or the matrices before, have freed
        budget = self._plan.budgets[specs[0].name]
        unseen = stats is None and of_text(self._method.needs)
        method: Method = Magnitude() if unseen else self._method
        matrices = [self._matrix(unit, spec) for spec in specs]
        try:
            if len(specs) > 1 and isinstance(method, Together):
                edits = method.solve_together(matrices, stats, budget)
            else:
                edits = [method.solve(one, stats, budget) for one in matrices]
        except RunError as error:
            raise RunError(f"{', '.join(spec.name for spec in specs)}: {error}") from error
        shared = (time.perf_counter() - started) / len(specs)
        for spec, matrix, edit in zip(specs, matrices, edits, strict=True):
            started = time.perf_counter()
            if unseen:
                edit.notes["fallback"] = "magnitude: no calibration token reached this expert"
            if stats is not None and fits_layers(method):
                self._solved[spec.name] = Solved(spec, matrix.weight_OI, stats, budget)
            if stats is not None and stats.remark is not None:
                edit.notes["statistics"] = stats.remark
            planned = method.planned(spec.outputs, spec.inputs, budget)
            self._check(spec, edit, planned, budget)
            outcome = self._store(unit, spec, matrix.weight_OI, edit, planned, stats)
            self._note(unit, outcome, round(shared + time.perf_counter() - started, 4))

    def _store(
        self, unit: Unit, spec: MatrixSpec, dense_OI: torch.Tensor, edit: Edit, planned: int, stats: Stats | None
    ) -> Outcome:
        """Put what became of a matrix where later layers see it."""
        dtype = self._weights.storage_dtype(spec.parameter)
        # what later layers see is what will be read back: the weights as they are stored
        stored_OI = edit.weight_OI.to(dtype).masked_fill(edit.pruned_OI, 0)
        write_matrix(self._weights, unit, spec, stored_OI)
        lost, kind = _relative_error(dense_OI, edit, stats)
        achieved = int((stored_OI[edit.pruned_OI] == 0).sum())
        if achieved != planned:
            raise RunError(f"{spec.name}: planned {planned} zeros, {achieved} would be stored")
        extra = int((stored_OI == 0).sum()) - achieved
        if extra:
            edit.notes["zeros_beyond_plan"] = extra
        return Outcome(
            name=spec.name,
            shape=(spec.outputs, spec.inputs),
            planned=planned,
            achieved=achieved,
            error=lost,
            error_kind=kind,
            tokens=stats.tokens if stats else 0 if of_text(self._method.needs) else None,
            notes=edit.notes,
        )

    def _exchange(self, unit: Unit, specs: list[MatrixSpec]) -> None:
        """Bring in those of the matrices that other processes have solved."""
        ranks, names = self._share.ranks, {spec.name for spec in specs}
        mine = [(dataclasses.asdict(one), self._seconds[one.name]) for one in self._outcomes if one.name in names]
        solved = {row["name"]: (rank, row, s) for rank, rows in enumerate(ranks.gather(mine)) for row, s in rows}
        for spec in specs:
            rank, row, seconds = solved[spec.name]
            sent_OI = read_matrix(self._weights, unit, spec).to(self._weights.storage_dtype(spec.parameter))
            sent_OI = sent_OI.contiguous()
            ranks.broadcast_(sent_OI, rank)
            if rank != ranks.rank:
                write_matrix(self._weights, unit, spec, sent_OI)
                self._note(unit, Outcome(**row), seconds)

    def _note(self, unit: Unit, outcome: Outcome, seconds: float) -> None:
        self._wanted[unit.name].discard(outcome.name)
        self._outcomes.append(outcome)
        self._seconds[outcome.name] = seconds
        self._reporter.matrix(outcome, seconds)

    def _matrix(self, unit: Unit, spec: MatrixSpec) -> Matrix:
        dense_OI = read_matrix(self._weights, unit, spec)
        if not bool(torch.isfinite(dense_OI).all()):
            raise RunError(f"{spec.name} holds NaN or infinity; the checkpoint is damaged: download it again")
        return with_gradients(self._gradients, spec, dense_OI)

    def _check(self, spec: MatrixSpec, edit: Edit, planned: int, budget: Budget) -> None:
        """Fail the run if a method did not do what was planned."""
        pruned = int(edit.pruned_OI.sum())
        if pruned != planned:
            raise RunError(f"{spec.name}: planned {planned} zeros, the method made {pruned}")
        if not bool(torch.isfinite(edit.weight_OI).all()):
            raise RunError(f"{spec.name}: the method returned NaN or infinity")
        if budget.pattern.structured:
            per_group = edit.pruned_OI.unflatten(1, (-1, budget.pattern.group)).sum(-1)
            if bool((per_group != budget.pattern.group - budget.pattern.keep).any()):
                raise RunError(f"{spec.name}: the mask breaks the pattern {budget.pattern}")


def _relative_error(dense_OI: torch.Tensor, edit: Edit, stats: Stats | None) -> tuple[float | None, str]:
    """How much of the matrix's output energy is lost on the calibration tokens, and how that was measured.

    "output": exact, from the Gram matrix. "diagonal": inputs taken as uncorrelated, where only their
    norms are known. "weight": share of the squared weights, without any calibration.
    """
    change_OI = edit.weight_OI - dense_OI
    if stats is not None and stats.has_gram:
        lost = edit.loss if edit.loss is not None else output_energy(change_OI, stats.gram_lower_II)
        whole, kind = output_energy(dense_OI, stats.gram_lower_II), "output"
    elif stats is not None:
        scale_I = stats.square_sums_I
        lost = float((change_OI.square() @ scale_I).sum())
        whole, kind = float((dense_OI.square() @ scale_I).sum()), "diagonal"
    else:
        lost, whole, kind = float(change_OI.square().sum()), float(dense_OI.square().sum()), "weight"
    return (lost / whole if whole > 0 else None), kind
