"""One pruning job from recipe to finished folder: everything around the loop of `pipeline`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from llmprune import calibration, record
from llmprune.allocation import Dense, Measured, allocator, entry
from llmprune.arch.discover import parameter_count
from llmprune.calibration import Tokens
from llmprune.checkpoint.adapter import FOLDER, write_adapter
from llmprune.checkpoint.output import REPORT_NAME
from llmprune.checkpoint.remote import add_code, trusted
from llmprune.checkpoint.shared_output import SharedOutput
from llmprune.checkpoint.skeleton import build_skeleton, check_config, load_config, run_experts_one_by_one
from llmprune.checkpoint.source import Checkpoint, copy_companions, hub_id, resolve
from llmprune.checkpoint.verify import logits, verify
from llmprune.device import choose_device, choose_dtype
from llmprune.engine.divergence import Variant
from llmprune.engine.gradient_store import Gradients, check_gradients
from llmprune.engine.share import Share
from llmprune.fitting import ENGINE, finished, halve_batches, look_ahead, settle
from llmprune.forecast import Forecast, as_record
from llmprune.kernels import dispatch
from llmprune.kernels.product import FastLinear
from llmprune.measurement import Measurement, Scores, compare, each_matrix
from llmprune.memory import PeakMemory, within_memory
from llmprune.methods import allocation_of, epochs_of, method_of, score_of
from llmprune.pipeline import Pruning, fits_layers
from llmprune.plan import Plan, allocate, select_matrices
from llmprune.progress import Reporter
from llmprune.ranks import current
from llmprune.recipe import Recipe
from llmprune.reordering import Reordering, check_reordering, find_orders
from llmprune.result import Result
from llmprune.statistics import OF_WEIGHTS, of_text
from llmprune.types import Budget, MatrixSpec, UserError
from llmprune.weights import REST, Resident, Streamed


class Job:
    """A checked recipe together with its model, text and output. Creating one reads, but writes nothing."""

    def __init__(
        self, recipe: Recipe, model: PreTrainedModel | None, tokenizer: Any, data: Any, out: str | Path | None
    ) -> None:
        self.recipe, self.ranks = recipe, current()
        self._kernels: dict[str, Any] = {}
        self.method: Any = method_of(recipe)
        self.check_amount(recipe, self.method)
        self.epochs = epochs_of(recipe)
        self._given, self._tokenizer, self._data = model, tokenizer, data
        self.folder = None if model is not None else resolve(recipe.model)
        self.checkpoint = None if self.folder is None else Checkpoint(self.folder)
        if model is not None:
            check_config(model.config, type(model).__name__)
            self.config, self.device, self.dtype = model.config, model.device, model.dtype
            self._check_engine()
            self.model = model
        else:
            self.config = load_config(str(self.folder), trust_remote_code=recipe.trust_remote_code)
            self.device = choose_device(recipe.engine.device)
            self.dtype = choose_dtype(recipe.engine.dtype, self.config, self.device)
            self.model = build_skeleton(self.config, self.dtype, trust_remote_code=recipe.trust_remote_code)
        dispatch.check_choice(self.device)
        self.plan = self._make_plan()
        if recipe.permute:
            check_reordering(self.model, recipe.budget())
        self.tokens = self._read_tokens() if self._reads_text() else None
        self.share = self._shared()
        self.forecast: Forecast | None = None
        self._order = Reordering()
        self.notes: list[str] = []  # what the user should know of how the run went
        self.output = None if out is None else SharedOutput(Path(out), self.fingerprint(), self.ranks)

    @staticmethod
    def check_amount(recipe: Recipe, method: Any) -> None:
        """Whether the recipe says how much to prune, and in a way that the method understands; raises UserError."""
        if method.kind != "weight":
            raise UserError(f"{recipe.method!r} is no method for weights")
        recipe.budget()
        allocator(allocation_of(recipe))
        if fits_layers(method) and current().count > 1:
            raise UserError(f"{recipe.method!r} works in one process: start it without torchrun")

    def _reads_text(self) -> bool:
        """Whether the recipe takes calibration text."""
        recipe = self.recipe
        return self.runs or entry(allocation_of(recipe)).measures or recipe.permute

    def _check_engine(self) -> None:
        """Whether the recipe leaves a loaded model where it is, and as it is; raises UserError."""
        for key, own in (("device", self.device.type), ("dtype", str(self.dtype).removeprefix("torch."))):
            asked = getattr(self.recipe.engine, key)
            if asked not in ("auto", own, str(self.device)):
                raise UserError(
                    f"engine.{key}={asked} has no meaning for a loaded model, which is pruned as it is ({own}): "
                    f"leave it out, or call model.to({asked!r}) first"
                )

    @property
    def _splits(self) -> bool:
        return bool(getattr(self.method, "split", False))

    @property
    def runs(self) -> bool:
        """Whether pruning runs the model on text: for its method, or to fit layers to their dense outputs."""
        return of_text(self.method.needs) or self.epochs > 0

    def _make_plan(self) -> Plan:
        plan = select_matrices(self.model, self.recipe)
        if self.method.needs & OF_WEIGHTS:
            check_gradients(self.recipe.method, self.method.needs, self.model, plan.units, self.device)
        return plan

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Everything that can still be wrong before work starts; raises UserError."""
        if self.output is not None:
            self.output.check(source=self.folder, resume=resume, overwrite=overwrite)
        experts = any(spec.index is not None for spec in self.plan.specs())
        if self._splits and (self.checkpoint is None or self.output is None or experts):
            raise UserError("split stores an adapter beside a model: prune a folder into --out, without fused experts")

    def budgets(self, recipe: Recipe) -> dict[str, Budget]:
        """The amount for every matrix, for a recipe that differs from the job's in nothing else; raises UserError."""
        with torch.no_grad():
            allocate(self.plan, recipe, self.method, allocator(allocation_of(recipe)), self.dense())
        return dict(self.plan.budgets)

    def dense(self) -> Dense:
        """The model before pruning: its chosen matrices, and passes over them that change nothing."""
        weights = self._weights(writing=False)

        def measure(kinds: frozenset[str], look: Callable[[int, Measured], None]) -> None:
            everywhere = self.recipe.calibration.all_experts
            with self.prepared(weights):
                Measurement(self.plan, weights, kinds, look, all_experts=everywhere).run_on(self.model, self.share)

        def diverge(variants: Sequence[Variant], sequences: int) -> list[float]:
            assert self.tokens is not None
            batches = [{"input_ids": one.to(self.device)} for one in self.tokens.batches(self.recipe.engine.batch_size)]
            with self.prepared(weights):
                return compare(self.model, self.plan, weights, batches, variants, sequences)

        def matrices() -> Iterable[tuple[MatrixSpec, torch.Tensor]]:
            return each_matrix(self.plan, weights)

        count = sum(spec.count for spec in self.plan.specs())
        scores = Scores(score_of(self.method), count, matrices, measure, lambda: self._gradients)
        return Dense(self.plan.layers(), matrices, scores.each, measure, diverge)

    def fingerprint(self) -> str:
        """A hash of all that decides the bytes of the result: equal for a run and its resumption."""
        decides = {
            "recipe": self.recipe.model_dump(exclude={"model"}),
            "model": self.checkpoint.fingerprint() if self.checkpoint else None,
            "tokens": self.tokens.digest() if self.tokens else None,
            "versions": record.versions(),
            "device": self.device.type,
            "kernels": dispatch.fingerprint(self.device),
        }
        return record.key_of(decides)

    @within_memory()
    def run(self, reporter: Reporter, memory: PeakMemory, started: float, *, resume: bool) -> Result:
        """Do it. Raises RunError when something fails on the way."""
        trust = self.recipe.trust_remote_code
        if self.output is not None and self.output.claim(resume=resume):
            reporter.say(f"{self.output.folder} is already finished")
            return Result(self._stored_report(), self.output.folder, trust)
        self.budgets(self.recipe)
        if self.output is not None:
            self.output.open()
        for text in self.tokens.warnings if self.tokens else ():
            reporter.warn(text)
        if self.recipe.permute:
            self._reorder(reporter)
        weights = self._weights(writing=True)
        done = weights.done() - {REST, ENGINE}
        if done:
            reporter.say(f"resuming: {len(done)} of {len(self.plan.units)} layers are done")
        settle(self, weights, reporter, started, resumed=bool(done))
        known = sum(s.count for u in self.plan.units if u.name in done for s in u.matrices)
        reporter.start(sum(spec.count for spec in self.plan.specs()), known)
        try:
            with torch.no_grad(), dispatch.recorded() as self._kernels, self.prepared(weights):
                if isinstance(weights, Streamed) and REST not in weights.done():
                    weights.commit_rest()
                while not finished(self, self._pruning(weights, reporter), weights):
                    halve_batches(self, weights, reporter)
        finally:
            reporter.stop()
        if self.output is None:
            return Result(self._report(weights, memory, started, "not saved"), None, trust, self.model, self._tokenizer)
        self.output.finish(
            self._add_files,
            lambda folder: self._report(weights, memory, started, self._verify(folder, weights)),
        )
        return Result(self._stored_report(), self.output.folder, trust, self._given, self._tokenizer)

    @within_memory()
    def describe_plan(self) -> dict[str, Any]:
        """What would be done: the answer of a dry run."""
        self.budgets(self.recipe)
        specs = self.plan.specs()
        rows: list[dict[str, Any]] = [
            {
                "name": spec.name,
                "shape": [spec.outputs, spec.inputs],
                "planned": self.method.planned(spec.outputs, spec.inputs, self.plan.budgets[spec.name]),
            }
            for spec in specs
        ]
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "tensors": rows,
            "left_alone": self.plan.left_alone,
            "calibration": self.tokens.describe() if self.tokens else None,
            "totals": {"weights": sum(s.count for s in specs), "zeros": sum(row["planned"] for row in rows)},
            "forecast": as_record(look_ahead(self, self._weights(writing=False), self.recipe.engine)),
        }

    # Parts of a run.

    def _reorder(self, reporter: Reporter) -> None:
        with torch.no_grad():
            self._order = find_orders(self.model, self.plan, self.dense())
            if self.checkpoint is None:
                for unit in self.plan.units:
                    self._order.apply(unit)
        self.notes.append(str(self._order))
        reporter.say(self.notes[-1])

    def _pruning(self, weights: Streamed | Resident, reporter: Reporter) -> Pruning:
        gradients = self._gradients if self.method.needs & OF_WEIGHTS else None
        return Pruning(self.plan, self.recipe, self.method, weights, reporter, self.share, self.epochs, gradients)

    def use_engine(self, **settings: Any) -> None:
        """Run with another schedule or batch size than the recipe says."""
        self.recipe = self.recipe.model_copy(update={"engine": self.recipe.engine.model_copy(update=settings)})
        self.share = self._shared()

    @cached_property
    def _gradients(self) -> Gradients:
        """Of the dense model, for the method's score; made when they are first asked for."""
        weights = self._weights(writing=False)
        (kind,) = self.method.needs & OF_WEIGHTS
        sequences = [torch.zeros(1, 1, dtype=torch.int64)]
        if of_text(frozenset({kind})):
            assert self.tokens is not None
            sequences = self.tokens.batches(1)
        batches = [{"input_ids": one.to(self.device)} for one in sequences]
        with torch.no_grad(), self.prepared(weights):
            return Gradients(self.model, self.plan.units, batches, weights, self.plan.specs(), kind)

    def _weights(self, *, writing: bool) -> Streamed | Resident:
        if self.checkpoint is None:
            return Resident(self.model, self.plan.units)
        output = self.output if writing else None
        weights = Streamed(self.model, self.checkpoint, output, self.plan.units, self.dtype, self.device)
        weights.prepare = self._order.apply
        return weights

    @contextlib.contextmanager
    def prepared(self, weights: Streamed | Resident) -> Iterator[None]:
        """The model as calibration needs it; a model of the caller's gets its settings back."""
        if isinstance(weights, Streamed):
            with weights.on_demand(), FastLinear():
                yield
            return
        training = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            with run_experts_one_by_one(self.model), FastLinear():
                yield
        finally:
            for module, was in training.items():
                module.training = was

    def _read_tokens(self) -> Tokens:
        settings = self.recipe.calibration
        if self._data is not None:
            tokens = calibration.given(self._data)
        else:
            if self._tokenizer is None:
                self._tokenizer = calibration.load_tokenizer(self.folder, self.recipe.trust_remote_code)
            tokens = calibration.sample(
                settings.source,
                self._tokenizer,
                samples=settings.samples,
                length=min(settings.seqlen, calibration.longest(self.config)),
                seed=self.recipe.seed,
            )
        largest = max(int(one.max()) for one in tokens.sequences)
        calibration.check_vocabulary("the calibration data", largest, self.model.get_input_embeddings())
        return tokens

    def _shared(self) -> Share:
        engine = self.recipe.engine
        batches = self.tokens.batches(engine.batch_size) if self.tokens is not None else []
        return Share.of(batches, self.device, self.ranks, ordered=engine.reduce == "ordered")

    def _add_files(self, folder: Path) -> None:
        if self.folder is not None:
            copy_companions(self.folder, folder, code=trusted(self.folder, self.recipe.trust_remote_code))
            if self._splits:
                matrices = each_matrix(self.plan, self._weights(writing=False))
                parts = ((s, *self.method.parts(w, self.plan.budgets[s.name])[:2]) for s, w in matrices)
                write_adapter(folder / FOLDER, parts)
        else:
            if self._tokenizer is not None:
                self._tokenizer.save_pretrained(folder)
            self.model.save_pretrained(folder)
            if hasattr(self.model.config, "pruned_layers"):
                add_code(folder, self.model)

    def _stored_report(self) -> dict[str, Any]:
        assert self.output is not None
        report: dict[str, Any] = json.loads((self.output.folder / REPORT_NAME).read_text())
        return report

    def _verify(self, folder: Path, weights: Streamed | Resident) -> str:
        expected = self._logits_in_memory if isinstance(weights, Resident) else None
        unused = weights.unused if isinstance(weights, Streamed) else []
        return verify(folder, expected, unused, trust_remote_code=self.recipe.trust_remote_code)

    def _logits_in_memory(self, ids: torch.Tensor) -> torch.Tensor:
        return logits(self.model, ids)

    def _report(
        self,
        weights: Streamed | Resident,
        memory: PeakMemory,
        started: float,
        verified: str,
    ) -> dict[str, Any]:
        found = record.of_matrices(self.plan, weights, self.tokens)
        params, zeros = (
            parameter_count(self.model),
            (one["achieved"] + one["notes"].get("zeros_beyond_plan", 0) for one in found["tensors"]),
        )
        described = self._describe_run(memory, started)
        described["run"]["matrix_seconds"] = {
            name: value for unit in self.plan.units for name, value in weights.records[unit.name]["seconds"].items()
        }
        return {
            **described,
            **found,
            "totals": {"params_before": params, "params_after": params, "zeros": sum(zeros)},
            "verified": verified,
        }

    def _describe_run(self, memory: PeakMemory, started: float) -> dict[str, Any]:
        """The part of the report that every kind of job has: what was asked, on what, and what it took."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "hub_model": hub_id(self.recipe.model),
            "versions": record.versions(),
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "calibration": self.tokens.describe() if self.tokens else None,
            "layout": "remote-code" if hasattr(self.config, "pruned_layers") else "plain",
            "run": {
                **record.cost(memory, started, self.ranks.count),
                "kernels": self._kernels,
                "forecast": as_record(self.forecast),
                "notes": self.notes,
            },
        }
