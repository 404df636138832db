"""The training loop: any number of processes, one trajectory.

A step is on the same sequences, in the same order and with the same random numbers whatever was interrupted and
however many processes share it; only the order in which they sum differs.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from llmprune.arch.discover import decoder_layers
from llmprune.progress import Reporter
from llmprune.recovery.data import IGNORED, Corpus, Sequences
from llmprune.recovery.kind import Kind
from llmprune.recovery.losses import Loss, cross_entropy
from llmprune.recovery.recipe import Training
from llmprune.recovery.state import State, read_best, read_state, write_best, write_state
from llmprune.types import RunError

BETAS = (0.9, 0.99)


@dataclass
class Trainer:
    """One training: `model` as its kind prepared it, on `corpus`, in `folder` (the state of an interrupted run)."""

    plain: PreTrainedModel
    model: nn.Module
    kind: Kind
    corpus: Corpus
    loss: Loss
    settings: Training
    seed: int
    folder: Path
    accelerator: Accelerator
    reporter: Reporter
    state: State = field(default_factory=State)

    def run(self) -> State:
        """Train, and leave the best weights in the model. Raises RunError if the loss is no number any more."""
        steps = self.steps()
        if self.settings.gradient_checkpointing:
            self.plain.gradient_checkpointing_enable({"use_reentrant": False})
            self.plain.enable_input_require_grads()
        forward = self._distributed()
        rate = self.settings.learning_rate or self.kind.learning_rate
        groups = self.kind.groups(self.model)
        optimizer = torch.optim.AdamW(groups, lr=rate, betas=BETAS, weight_decay=self.settings.weight_decay)
        self.trained = {name: one for name, one in self.model.named_parameters() if one.requires_grad}
        if (self.folder / "state.safetensors").exists():
            self.state = read_state(self.folder, self.model, self.trained, optimizer)
            self.reporter.say(f"resuming at step {self.state.done} of {steps}")
        else:
            self._look(forward, optimizer, steps)
        self.model.train()
        began = time.monotonic() - self.state.seconds
        while self.state.done < steps and not self._enough(began):
            progress = max(self.state.done / steps, self._share_of_time(began))
            for group in optimizer.param_groups:
                peak = group["rate"] if "rate" in group else rate * group["scale"]
                group["lr"] = peak * schedule(progress, self.state.done, steps, self.settings.warm_up)
            self._step(forward, optimizer)
            self.state.done += 1
            if self.kind.after_step(self.state.done, steps):
                optimizer.state.clear()
            if self.state.done % self.settings.evaluate_every == 0 or self.state.done == steps:
                self.state.seconds = time.monotonic() - began
                self._look(forward, optimizer, steps)
        if self.state.done < steps and self.state.done > self.state.curve[-1]["step"]:
            self.state.seconds = time.monotonic() - began
            self._look(forward, optimizer, steps)
        if self.state.best_step is not None:
            read_best(self.folder, self.model)
        return self.state

    def steps(self) -> int:
        """How many steps there will be."""
        if self.settings.steps is not None:
            return self.settings.steps
        return max(1, math.ceil(self.settings.epochs * len(self.corpus.train) / self.settings.batch_size))

    def _distributed(self) -> Callable[..., Any]:
        """The model as this process runs it, its part of the weights on the right device."""
        if not self.settings.shard:
            prepared: Callable[..., Any] = self.accelerator.prepare(self.model)
            return prepared
        mesh = init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,))
        for layer in decoder_layers(self.plain)[1]:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        return self.model

    def _step(self, forward: Callable[..., Any], optimizer: torch.optim.Optimizer) -> None:
        """One change of the weights. The loss is the mean over all scored tokens of the step's sequences."""
        count, rank, size = self.accelerator.num_processes, self.accelerator.process_index, self.settings.micro_batch
        rows = self._rows(self.state.done)
        tokens = self.corpus.train.rows(rows).scored()
        mine = rows[rank::count]
        torch.manual_seed((self.seed * 2**32 + self.state.done * 2**10 + rank) % 2**63)
        total = torch.zeros((), device=self.accelerator.device)
        for start in range(0, len(mine), size):
            last = start + size >= len(mine)
            batch = _on(self.accelerator.device, self.corpus.train.rows(mine[start : start + size]))
            with self._synchronised(forward, last), self._autocast():
                loss = self.loss(forward, batch, mine[start : start + size])
                # gradients are averaged over processes, and penalties are the same on each
                whole = loss * count / max(tokens, 1) + (self.kind.penalty() if last else 0.0)
                self.accelerator.backward(whole)
            total += loss.detach()
        # of a sharded model the norm is over all shards; the price of gates must not make the weights' steps small
        norms = [nn.utils.clip_grad_norm_(group["params"], self.settings.clip) for group in optimizer.param_groups]
        if not all(bool(torch.isfinite(one)) for one in norms):
            raise RunError(
                f"the gradient of step {self.state.done + 1} is no finite number; "
                "set a smaller training.learning_rate, or training.precision=float32"
            )
        optimizer.step()
        optimizer.zero_grad()
        self.state.losses.append(float(self.accelerator.reduce(total)) / max(tokens, 1))

    def _autocast(self) -> torch.autocast:
        low = self.settings.precision == "bfloat16"
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=low)

    def _synchronised(self, forward: Any, last: bool) -> Any:
        """Exchange gradients only with the last batch of a step."""
        if self.settings.shard:
            forward.set_requires_gradient_sync(last)
            return contextlib.nullcontext()
        # accelerate's own way forgets that a lone process of torchrun's exchanges with itself
        return contextlib.nullcontext() if last else getattr(forward, "no_sync", contextlib.nullcontext)()

    def _rows(self, step: int) -> list[int]:
        """Which sequences step number `step` is on: a new order of all of them for every time through."""
        rows: list[int] = []
        number = step * self.settings.batch_size
        while len(rows) < self.settings.batch_size:
            epoch, place = divmod(number + len(rows), len(self.corpus.train))
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(len(self.corpus.train), generator=generator).tolist()
            rows += order[place : place + self.settings.batch_size - len(rows)]
        return rows

    def _look(self, forward: Callable[..., Any], optimizer: torch.optim.Optimizer, steps: int) -> None:
        """Measure on the held-out text, keep the best, and store where the training stands."""
        state = self.state
        perplexity = self.held_out(forward)
        loss = sum(state.losses) / len(state.losses) if state.losses else None
        state.curve.append({"step": state.done, "loss": loss, "perplexity": perplexity, "seconds": state.seconds})
        state.losses = []
        best = min((one["perplexity"] for one in state.curve if one["step"] == state.best_step), default=math.inf)
        improved = self.kind.settled(state.done, steps) and perplexity < best
        if improved:
            state.best_step, state.waited = state.done, 0
            write_best(self.folder, self.trained, self.model, self.accelerator)
        else:
            state.waited += 1
        write_state(self.folder, state, self.trained, self.model, optimizer, self.accelerator)
        text = "" if loss is None else f"loss {loss:.4f}, "
        minutes = "" if not state.done else f", {(steps - state.done) / state.done * state.seconds / 60:.1f} min left"
        self.reporter.say(
            f"step {state.done} of {steps}: {text}held-out perplexity {perplexity:.3f}"
            f"{' (best)' if improved else ''}{minutes}"
        )

    @torch.no_grad()
    def held_out(self, forward: Callable[..., Any]) -> float:
        """Perplexity of the present weights on the held-out text: every scored token weighs the same."""
        training = self.model.training
        self.model.eval()
        data, device = self.corpus.held_out, self.accelerator.device
        share = self.settings.micro_batch * self.accelerator.num_processes
        total = torch.zeros(2, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
        for start in range(0, len(data), share):
            # every process runs as many batches: those beyond the end have no labels
            first = start + self.accelerator.process_index * self.settings.micro_batch
            numbers = list(range(first, min(first + self.settings.micro_batch, len(data))))
            batch = _on(device, data.rows(numbers or [0]))
            if not numbers:
                batch.labels_NT.fill_(IGNORED)
            with self._autocast():
                loss = cross_entropy(forward, batch, numbers)
            total += torch.stack([loss.detach().to(total.dtype), torch.tensor(batch.scored()).to(total)])
        loss, count = self.accelerator.reduce(total).tolist()
        self.model.train(training)
        return math.exp(min(loss / count, 700.0))

    def _enough(self, began: float) -> bool:
        patience = self.settings.patience
        return (patience is not None and self.state.waited >= patience) or self._share_of_time(began) >= 1

    def _share_of_time(self, began: float) -> float:
        """The share of the allowed time that is used, of the process that is furthest."""
        if self.settings.minutes is None:
            return 0.0
        used = torch.tensor((time.monotonic() - began) / 60 / self.settings.minutes, device=self.accelerator.device)
        return float(self.accelerator.gather(used.view(1)).max())


def schedule(progress: float, done: int, steps: int, warm_up: int) -> float:
    """The rate of a step as a share of its peak: linear warm-up, then half a cosine to zero."""
    rise = min(warm_up, max(1, steps // 10))
    return min(1.0, (done + 1) / max(rise, 1)) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def _on(device: torch.device, rows: Sequences) -> Sequences:
    return Sequences(rows.ids_NT.to(device), rows.labels_NT.clone().to(device))
