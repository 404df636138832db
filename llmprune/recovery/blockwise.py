"""Layer by layer towards the dense parent: no gradient through the model, one layer in memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmprune.arch.discover import Unit, find_units
from llmprune.arch.sublayers import attends, halves
from llmprune.calibration import check_vocabulary, load_tokenizer, longest
from llmprune.checkpoint.output import Output
from llmprune.checkpoint.skeleton import build_skeleton, load_config
from llmprune.checkpoint.source import Checkpoint, copy_companions, resolve
from llmprune.checkpoint.verify import verify
from llmprune.device import choose_device, choose_dtype
from llmprune.engine import schedule
from llmprune.engine.closed_form import fit_layer
from llmprune.engine.reconstruct import output_of, reconstruct
from llmprune.engine.share import Share
from llmprune.engine.suspend import Calls
from llmprune.kernels.product import FastLinear
from llmprune.memory import PeakMemory
from llmprune.methods import make_options
from llmprune.progress import Reporter
from llmprune.record import key_of, versions
from llmprune.recovery.data import Sequences, read_corpus
from llmprune.recovery.history import parent_of, read_history, run_record, with_recovery
from llmprune.recovery.recipe import Recovery, Training
from llmprune.result import Result
from llmprune.statistics import Stats
from llmprune.types import UserError
from llmprune.weights import REST, Streamed

PARTS = ("layer", "halves")


@dataclass
class Options:
    """`samples`: sequences of the text that are used, drawn by the seed. `passes`: times that a layer sees them.

    `parts`: a "layer" at once, or its "halves" apart: first the attention, then the rest, each towards the layer's dense
    output, with optimizer states for one of them at a time. `passes` 0 fits what each half writes with, in closed form.
    """

    samples: int = 128
    passes: int = 5
    parts: str = "layer"

    def __post_init__(self) -> None:
        if self.parts not in PARTS:
            raise UserError(f"parts={self.parts!r} of kind 'blockwise' must be one of {', '.join(PARTS)}")
        if self.passes < 0 or self.samples < 1:
            raise UserError(f"passes={self.passes} must be at least 0, and samples={self.samples} at least 1")


class Blockwise:
    """A checked recipe with its text and both models' checkpoints. Creating one reads, but writes nothing.

    Every decoder layer of the pruned model, on the inputs that it really gets, is fitted to what the dense model's layer
    puts out for the same text: matrices, biases and norms, the zeros of matrices apart (see `engine.reconstruct`).
    """

    def __init__(self, recipe: Recovery, out: Path) -> None:
        self.recipe, self.started = recipe, time.perf_counter()
        self.options: Options = make_options(Options, recipe.options, "kind 'blockwise'", seed=recipe.seed)
        for key, value in recipe.training.model_dump(exclude={"micro_batch"}).items():
            if value != Training.model_fields[key].default:
                raise UserError(
                    f"training.{key}={value} has no meaning for 'blockwise', which has options passes and samples"
                )
        self.folder = resolve(recipe.model)
        self.history = read_history(self.folder)
        self.checkpoint = Checkpoint(self.folder)
        self.parent = Checkpoint(resolve(recipe.distill.teacher or parent_of(self.history)))
        trust = recipe.trust_remote_code
        self.config = load_config(str(self.folder), trust_remote_code=trust)
        self.device = choose_device(recipe.device)
        self.dtype = choose_dtype("auto", self.config, self.device)
        self.model = build_skeleton(self.config, self.dtype, trust_remote_code=trust)
        self.units = find_units(self.model, head=False)
        if self.options.passes == 0:
            self._check_writers()
        self._check_parent()
        tokenizer = load_tokenizer(self.folder, trust)
        corpus = read_corpus(recipe.data, tokenizer, min(recipe.data.seqlen, longest(self.config)))
        order = torch.randperm(len(corpus.train), generator=torch.Generator().manual_seed(recipe.seed))
        self.text: Sequences = corpus.train.rows(order[: self.options.samples].tolist())
        check_vocabulary(
            f"the text {recipe.data.source!r}", int(self.text.ids_NT.max()), self.model.get_input_embeddings()
        )
        self.output = Output(out, self._fingerprint())

    def run(self, memory: PeakMemory, reporter: Reporter, *, resume: bool, overwrite: bool) -> Result:
        """Fit every layer, write, and describe what was done."""
        output, trust = self.output, self.recipe.trust_remote_code
        output.check(source=self.folder, resume=resume, overwrite=overwrite)
        if output.claim(resume=resume):
            reporter.say(f"{output.folder} is already finished")
            return Result(read_history(output.folder), output.folder, trust)
        output.open()
        try:
            weights = self._weights(output)
            if REST not in weights.done():
                weights.commit_rest()
            work = _Refit(self.units, weights, self.options, self.recipe.seed, reporter)
            size = self.recipe.training.micro_batch
            batches = [{"input_ids": one.to(self.device)} for one in self.text.ids_NT.split(size)]
            with torch.no_grad(), weights.on_demand(), FastLinear():
                schedule.run(self.model, self.units, Share.alone(batches), "layer", work)
            self._finish(weights, memory)
        finally:
            output.close()
        return Result(read_history(output.folder), output.folder, trust)

    def _check_parent(self) -> None:
        """Whether both models differ in nothing but the values inside their layers; raises UserError."""
        where = self.parent.folder
        other = "choose finetune, distill or an adapter for such a model"
        if where.resolve() == self.folder.resolve():
            raise UserError(f"{self.folder} is the dense model itself; name the folder of a pruned one")
        shapes = [{key: entry.shape for key, entry in one.entries.items()} for one in (self.checkpoint, self.parent)]
        if shapes[0] != shapes[1]:
            raise UserError(f"the tensors of {self.folder} and {where} differ in name or shape; {other}")
        routing = self._weights(None).routing
        inside = {key for unit in self.units for key in routing.keys_under(unit.prefix)}
        for key in self.checkpoint.entries:
            if key not in inside and not torch.equal(self.checkpoint.tensor(key), self.parent.tensor(key)):
                raise UserError(f"{key} of {self.folder}, outside the layers, is not that of {where}; {other}")

    def _check_writers(self) -> None:
        """Whether it is known through which matrices every layer writes; raises UserError."""
        try:
            for unit in self.units:
                halves(unit.module)
        except UserError as error:
            raise UserError(f"passes=0: {error}; set passes to 1 or more") from error

    def _weights(self, output: Output | None) -> Streamed:
        return Streamed(self.model, self.checkpoint, output, self.units, self.dtype, self.device, parent=self.parent)

    def _fingerprint(self) -> str:
        decides = {
            "recipe": self.recipe.model_dump(exclude={"model"}),
            "model": self.checkpoint.fingerprint(),
            "parent": self.parent.fingerprint(),
            "text": self.text.digest(),
            "versions": versions(),
            "device": self.device.type,
        }
        return key_of(decides)

    def _finish(self, weights: Streamed, memory: PeakMemory) -> None:
        recipe = self.recipe
        entry = {
            "recipe": recipe.model_dump(mode="json"),
            "versions": versions(),
            "data": {
                "source": recipe.data.source,
                "hash": self.text.digest(),
                "sequences": len(self.text),
                "seqlen": self.text.ids_NT.shape[1],
            },
            "teacher": str(self.parent.folder),
            "fits": [{"name": unit.name, **weights.records[unit.name]["fit"]} for unit in self.units],
        }

        def describe(folder: Path) -> dict[str, Any]:
            verified = verify(folder, None, weights.unused, trust_remote_code=recipe.trust_remote_code)
            run = run_record(memory, self.started, self.device)
            return {**with_recovery(self.history, {**entry, "run": run}, None), "verified": verified}

        self.output.finish(lambda folder: copy_companions(self.folder, folder, code=recipe.trust_remote_code), describe)


class _Refit:
    """What the engine calls back when every layer is fitted and none is pruned (see `engine.schedule.Work`)."""

    kinds: frozenset[str] = frozenset()
    all_experts = False
    reconstructs = True

    def __init__(self, units: list[Unit], weights: Streamed, options: Options, seed: int, reporter: Reporter) -> None:
        self._weights, self._options, self._seed, self._reporter = weights, options, seed, reporter
        self._open = {unit.name for unit in units} - weights.done()
        self._fit: dict[str, float] = {}

    def enter(self, unit: Unit) -> None:
        self._weights.load(unit)

    def enter_dense(self, unit: Unit) -> None:
        self._weights.load(unit, dense=True)

    def wanted(self, unit: Unit) -> set[str]:
        return set()

    def solve(self, unit: Unit, stats: dict[str, Stats], transposed: dict[str, bool]) -> None:
        raise AssertionError("nothing is pruned here")

    def reconstruct(self, unit: Unit, calls: Calls, targets: list[torch.Tensor]) -> bool:
        if unit.name not in self._open:
            return False
        storage = {name: self._weights.storage_dtype(unit.prefix + name) for name in _own(unit)}
        if self._options.passes == 0:
            before, after = fit_layer(unit, storage, calls, targets)
        else:
            before, after = self._by_gradient(unit, storage, calls, targets)
        self._fit = {"before": before, "after": after}
        self._reporter.say(f"{unit.name}: output error {before:.4f} of its energy, {after:.4f} when fitted")
        return True

    def _by_gradient(
        self,
        unit: Unit,
        storage: dict[str, torch.dtype],
        calls: Calls,
        targets: list[torch.Tensor],
    ) -> tuple[float, float]:
        """Fit the parts of a layer one after the other; its error before and after."""
        matrices = {spec.parameter.removeprefix(unit.prefix) for spec in unit.matrices}
        errors: list[float] = []
        for names in _parts(unit, self._options.parts):
            # a zero elsewhere, as in a bias, is a value like any other
            kept = {name: (unit.module.get_parameter(name) != 0) | (name not in matrices) for name in names}
            before, after = reconstruct(
                unit.module,
                {name: self._weights.places(unit, unit.prefix + name) for name in names},
                kept,
                storage,
                calls,
                targets,
                epochs=self._options.passes,
                seed=self._seed,
                share=Share.alone(calls),
            )
            calls = [(call, output_of(unit.module, {}, call)) for call, _ in calls]
            errors += [before, after]
        return errors[0], errors[-1]

    def finish(self, unit: Unit) -> None:
        if unit.name in self._open:
            self._weights.commit(unit, {"fit": self._fit})
            self._open.discard(unit.name)

    def leave(self, unit: Unit) -> None:
        self._weights.free(unit)

    def complete(self) -> bool:
        return not self._open


def _own(unit: Unit) -> list[str]:
    """The names of the parameters that no other layer lends."""
    return [name for name, _ in unit.module.named_parameters() if unit.prefix + name not in unit.borrowed]


def _parts(unit: Unit, parts: str) -> list[list[str]]:
    """The names of the parameters that are fitted together, in order."""
    names = _own(unit)
    if parts == "layer":
        return [names]
    return [[name for name in names if attends(name) == attention] for attention in (True, False)]
