"""A recovery by training: the model, its text and its teacher before the loop, the finished folder after it."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn
from transformers import PreTrainedModel

from llmprune.calibration import check_vocabulary, load_tokenizer, longest
from llmprune.checkpoint.output import Output
from llmprune.checkpoint.skeleton import Routing, load_config
from llmprune.checkpoint.source import Checkpoint, copy_companions, resolve
from llmprune.checkpoint.verify import logits, verify
from llmprune.device import choose_device
from llmprune.eval.perplexity import open_model
from llmprune.memory import PeakMemory
from llmprune.progress import Reporter
from llmprune.record import key_of, versions
from llmprune.recovery.data import read_corpus
from llmprune.recovery.distill import Beside, precompute
from llmprune.recovery.history import parent_of, read_history, run_record, with_recovery
from llmprune.recovery.kind import Kind
from llmprune.recovery.loop import Trainer
from llmprune.recovery.losses import Distillation, Loss, cross_entropy
from llmprune.recovery.recipe import Recovery
from llmprune.recovery.state import read_best
from llmprune.recovery.write import round_to_storage, write_weights
from llmprune.recovery.zeros import Target, count_zeros, find_targets, put_back
from llmprune.result import Result
from llmprune.types import UserError

# In the scratch folder: the record of a finished training, whose weights are written, and its configuration if that is new.
TRAINED = "trained.json"
SHAPE = "shape"


@dataclass
class Student:
    """A pruned model made trainable: `module` is what its kind made of `plain`."""

    plain: PreTrainedModel
    module: nn.Module
    targets: list[Target]


class TrainingRun:
    """A checked recipe with its text. Creating one reads, but writes nothing; raises UserError."""

    def __init__(self, recipe: Recovery, kind: Kind, out: Path) -> None:
        self.recipe, self.kind = recipe, kind
        self.started = time.perf_counter()
        self.folder = resolve(recipe.model)
        self.history = read_history(self.folder)
        self.checkpoint = Checkpoint(self.folder)
        self.config = load_config(str(self.folder), trust_remote_code=recipe.trust_remote_code)
        if recipe.training.shard and not kind.shards:
            raise UserError(
                f"{recipe.how!r} needs every matrix whole to choose what goes, which training.shard=true spreads over "
                "processes: leave it off (processes still share each step), or prune first and then recover with finetune"
            )
        tokenizer = load_tokenizer(self.folder, recipe.trust_remote_code)
        self.corpus = read_corpus(recipe.data, tokenizer, min(recipe.data.seqlen, longest(self.config)))
        largest = max(int(one.ids_NT.max()) for one in (self.corpus.train, self.corpus.held_out))
        if recipe.distill.hidden and not recipe.distill.share():
            raise UserError("distill.hidden is a part of the distance from the teacher: name it, or set distill.weight")
        self.teacher = self._find_teacher() if recipe.distill.share() else None
        self.processes = start_processes(recipe.device)
        if recipe.training.batch_size % self.processes.num_processes:
            raise UserError(
                f"training.batch_size {recipe.training.batch_size} must be a multiple of the "
                f"{self.processes.num_processes} processes"
            )
        self.student = self._open_student()
        check_vocabulary(f"the text {recipe.data.source!r}", largest, self.student.plain.get_input_embeddings())
        self.output = Output(out, self._fingerprint())

    def run(self, memory: PeakMemory, reporter: Reporter, *, resume: bool, overwrite: bool) -> Result:
        """Train, write, and describe what was done. The first of several processes writes; the others only train."""
        first = self.processes.is_main_process
        if first:
            self.output.check(source=self.folder, resume=resume, overwrite=overwrite)
            if not self.output.claim(resume=resume):
                self.output.open()
        self.processes.wait_for_everyone()
        if resume and self.output.is_finished():
            reporter.say(f"{self.output.folder} is already finished")
        else:
            try:
                self._work(memory, reporter if first else Reporter(quiet=True))
            finally:
                self.output.close()
        return Result(read_history(self.output.folder), self.output.folder, self.recipe.trust_remote_code)

    def _work(self, memory: PeakMemory, reporter: Reporter) -> None:
        first = self.processes.is_main_process
        expected = None
        if not (self.output.scratch / TRAINED).exists():
            entry, result = self._train(reporter)
            plain, cut = self.student.plain, self.kind.cut()
            # logits of other dtypes and devices differ by more than a wrong weight would show
            expected = result if plain.dtype == torch.float32 else None
            if first:
                routing, edit = Routing(plain, self.checkpoint), cut[1].cut if cut else None
                write_weights(self.output, plain, routing, self.checkpoint, self.student.targets, edit)
                (self.output.scratch / TRAINED).write_text(json.dumps(entry))
        if first:
            self._finish(expected, memory)
        self.processes.wait_for_everyone()

    # Before the training.

    def _find_teacher(self) -> Path:
        """The dense parent's folder; raises UserError for one that is no parent."""
        settings = self.recipe.distill
        if settings.hidden and settings.top_k:
            raise UserError("distill.hidden needs the teacher in memory: set distill.top_k=0 too")
        folder = resolve(settings.teacher or parent_of(self.history))
        Checkpoint(folder)
        config = load_config(str(folder), trust_remote_code=self.recipe.trust_remote_code)
        sizes = [one.get_text_config().vocab_size for one in (self.config, config)]
        if sizes[0] != sizes[1]:
            raise UserError(f"{folder} knows {sizes[1]} tokens and {self.folder} {sizes[0]}: it is not its dense model")
        layers = config.get_text_config().num_hidden_layers
        if settings.hidden and max(self._layers()) >= layers:
            raise UserError(f"{folder} has {layers} layers, so it is not the dense model of {self.folder}")
        return folder

    def _layers(self) -> list[int]:
        """Which layer of the dense model each layer is."""
        count: int = self.config.get_text_config().num_hidden_layers
        kept: list[int] = self.history.get("structure", {}).get("dropped", {}).get("kept_layers", [])
        return kept if len(kept) == count else list(range(count))

    def _open_student(self) -> Student:
        dtype = "float32" if self.kind.trains_base else "auto"
        trust = self.recipe.trust_remote_code
        plain, _ = open_model(self.folder, dtype=dtype, device="cpu", trust_remote_code=trust)
        self.unused = Routing(plain, self.checkpoint).unused
        plain.to(self.processes.device)
        targets = find_targets(plain)
        self.kind.check(targets)
        if self.recipe.adapter is not None and (why := self.kind.without_adapter(targets)):
            raise UserError(f"adapter={self.recipe.adapter}: {why}")
        torch.manual_seed(self.recipe.seed)  # where an adapter starts is drawn
        return Student(plain, self.kind.prepare(plain, targets), targets)

    def _open_teacher(self) -> PreTrainedModel:
        trust = self.recipe.trust_remote_code
        teacher, _ = open_model(str(self.teacher), device="cpu", trust_remote_code=trust)
        return teacher.to(self.processes.device)

    def _fingerprint(self) -> str:
        decides = {
            "recipe": self.recipe.model_dump(exclude={"model"}),
            "model": self.checkpoint.fingerprint(),
            "teacher": Checkpoint(self.teacher).fingerprint() if self.teacher else None,
            "text": self.corpus.digest(),
            "versions": library_versions(),
            "device": self.processes.device.type,
        }
        return key_of(decides)

    # The training, and after it.

    def _loss(self, reporter: Reporter) -> Loss:
        settings = self.recipe.distill
        if self.teacher is None:
            return cross_entropy
        if settings.top_k == 0:
            return Distillation(Beside(self._open_teacher(), settings, self._layers()), settings)
        size = self.recipe.training.micro_batch
        stored = precompute(
            self._open_teacher, self.corpus.train, self.output.scratch, settings, size, self.processes, reporter
        )
        return Distillation(stored, settings)

    def _trainer(self, loss: Loss, reporter: Reporter) -> Trainer:
        return Trainer(
            self.student.plain,
            self.student.module,
            self.kind,
            self.corpus,
            loss,
            self.recipe.training,
            self.recipe.seed,
            self.output.scratch,
            self.processes,
            reporter,
        )

    def _train(self, reporter: Reporter) -> tuple[dict[str, Any], PreTrainedModel]:
        """Train and merge; what the report says about it, and the model that comes out."""
        recipe, corpus = self.recipe, self.corpus
        if self.processes.is_main_process:
            self.output.scratch.mkdir(exist_ok=True)
        self.processes.wait_for_everyone()
        trained = sum(one.numel() for one in self.student.module.parameters() if one.requires_grad)
        trainer = self._trainer(self._loss(reporter), reporter)
        state = trainer.run()
        if recipe.training.shard:
            # its parts are spread over the processes: the best weights go into a whole one
            self.student = self._open_student()
            read_best(self.output.scratch, self.student.module)
        if recipe.adapter is not None and self.processes.is_main_process:
            self.kind.save_adapter(Path(recipe.adapter))
        plain, targets = self.student.plain, self.student.targets
        self.kind.merge(targets)
        put_back(plain, targets)
        round_to_storage(plain, Routing(plain, self.checkpoint), self.checkpoint)
        result = self._narrowed(plain)
        by_step = {one["step"]: one["perplexity"] for one in state.curve}
        return {
            "recipe": recipe.model_dump(mode="json"),
            "versions": library_versions(),
            "data": {
                "source": recipe.data.source,
                "form": corpus.form,
                "hash": corpus.digest(),
                "sequences": len(corpus.train),
                "held_out": len(corpus.held_out),
                "seqlen": corpus.train.ids_NT.shape[1],
                "scored_tokens": corpus.train.scored(),
            },
            "teacher": None if self.teacher is None else str(self.teacher),
            "trained": trained,
            "steps": state.done,
            "best_step": state.best_step,
            "curve": state.curve,
            # "stored": after merging, with the zeros put back and in the stored dtype
            "held_out": {
                "before": by_step[0],
                "trained": by_step[state.best_step],
                "stored": trainer.held_out(result),
            },
            "params": None if result is plain else sum(one.numel() for one in result.parameters()),
            "zeros": None if self.kind.keeps_zeros else count_zeros(result, find_targets(result)),
        }, result

    def _narrowed(self, plain: PreTrainedModel) -> PreTrainedModel:
        """The merged model, without the units that its kind leaves out; a new configuration goes to the scratch folder."""
        cut = self.kind.cut()
        if cut is None:
            return plain
        plan, slicing = replace(cut[0], config=self.config), cut[1]
        plan.config_of(slicing).save_pretrained(self.output.scratch / SHAPE)
        return plan.narrowed(slicing)

    def _finish(self, model: PreTrainedModel | None, memory: PeakMemory) -> None:
        """Complete the folder; `model` is what it must hold, if it is still in memory."""
        entry = json.loads((self.output.scratch / TRAINED).read_text())
        zeros, params = entry.pop("zeros"), entry.pop("params")
        trust = self.recipe.trust_remote_code

        def describe(folder: Path) -> dict[str, Any]:
            expected = None if model is None else lambda ids: logits(model, ids)
            verified = verify(folder, expected, self.unused, dtype=torch.float32, trust_remote_code=trust)
            run = run_record(memory, self.started, self.processes.device, self.processes.num_processes)
            return {**with_recovery(self.history, {**entry, "run": run}, zeros, params), "verified": verified}

        def add_files(folder: Path) -> None:
            copy_companions(self.folder, folder, code=trust)
            if (self.output.scratch / SHAPE).is_dir():
                shutil.copy(self.output.scratch / SHAPE / "config.json", folder)

        self.output.finish(add_files, describe)


def start_processes(device: str) -> Accelerator:
    """This process among those that `torchrun` or `accelerate launch` started; alone if nobody did."""
    kind = choose_device(device).type
    return Accelerator(
        cpu=kind == "cpu",
        # masks are the same on all of them
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


def library_versions() -> dict[str, str]:
    """The versions that can change what training comes to."""
    return {**versions(), **{name: importlib.metadata.version(name) for name in ("accelerate", "peft")}}
