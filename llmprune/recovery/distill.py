"""The dense parent as a teacher: its most likely tokens precomputed on disk, or the whole model beside the student."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import PreTrainedModel

from llmprune.progress import Reporter
from llmprune.recovery.data import IGNORED, Sequences
from llmprune.recovery.losses import divergence
from llmprune.recovery.recipe import Distill

# Sequences of a file of precomputed outcomes.
PART = 64


class Stored:
    """The log probabilities of the K most likely tokens at every place of the training text, read from disk.

    Parent and student are never in memory together. The loss is the forward divergence over those K tokens and all
    others taken together, at the settings' temperature, times its square (Hinton et al. 2015, arXiv:1503.02531).
    """

    def __init__(self, folder: Path, settings: Distill) -> None:
        self._folder, self._settings = folder, settings

    def compare(self, output: Any, batch: Sequences, numbers: list[int]) -> torch.Tensor:
        scored = _scored(batch)
        rows = [self._row(number) for number in numbers]
        teacher_TK = torch.stack([log for log, _ in rows]).to(scored.device)[scored]
        tokens_TK = torch.stack([tokens for _, tokens in rows]).to(scored.device)[scored].long()
        student_TV = F.log_softmax(output.logits[:, :-1][scored].float() / self._settings.temperature, -1)
        found = divergence(teacher_TK, student_TV.gather(-1, tokens_TK), rest=True)
        return self._settings.temperature**2 * found.sum()

    def _row(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What is stored of sequence `number`: two tensors, places x K."""
        with safe_open(self._folder / part_name(number // PART), framework="pt") as file:
            place = number % PART
            return file.get_slice("log")[place], file.get_slice("token")[place]


class Beside:
    """The parent in memory: divergence over the whole vocabulary, and errors of hidden states if asked for.

    `layers`: which layer of the parent each layer of the student is, where some were left out.
    """

    def __init__(self, teacher: PreTrainedModel, settings: Distill, layers: list[int]) -> None:
        self._teacher, self._settings = teacher.requires_grad_(False), settings
        self._layers = layers

    def compare(self, output: Any, batch: Sequences, numbers: list[int]) -> torch.Tensor:
        hidden, temperature = self._settings.hidden, self._settings.temperature
        with torch.no_grad():
            parent = self._teacher(input_ids=batch.ids_NT, use_cache=False, output_hidden_states=hidden > 0)
        scored = _scored(batch)
        teacher_TV, student_TV = (
            F.log_softmax(one.logits[:, :-1][scored].float() / temperature, -1) for one in (parent, output)
        )
        loss = temperature**2 * divergence(teacher_TV, student_TV, rest=False).sum()
        if hidden > 0:
            # place 0 is the embedding; the last state of each is normalised, which both have alike
            pairs = [(output.hidden_states[own + 1], parent.hidden_states[its + 1]) for own, its in
                     enumerate(self._layers)]  # fmt: skip
            errors = [
                (one[:, :-1][scored].float() - other[:, :-1][scored].float()).square().sum()
                / other[:, :-1][scored].float().square().sum()
                for one, other in pairs
            ]
            loss = loss + hidden * scored.sum() * torch.stack(errors).mean()
        return loss


def precompute(
    open_teacher: Callable[[], PreTrainedModel],
    data: Sequences,
    folder: Path,
    settings: Distill,
    batch_size: int,
    accelerator: Accelerator,
    reporter: Reporter,
) -> Stored:
    """Run the parent over the training text once, and store what `Stored` reads; parts that are there are kept."""
    parts = range((len(data) + PART - 1) // PART)
    mine = [part for part in parts if part % accelerator.num_processes == accelerator.process_index]
    missing = [part for part in mine if not (folder / part_name(part)).exists()]
    if missing:
        teacher = open_teacher()
        reporter.say(f"the dense model goes once over {len(data)} sequences of the training text")
        for part in missing:
            _store(teacher, data, part, folder, settings, batch_size)
    accelerator.wait_for_everyone()
    return Stored(folder, settings)


@torch.no_grad()
def _store(
    teacher: PreTrainedModel, data: Sequences, part: int, folder: Path, settings: Distill, batch_size: int
) -> None:
    logs, tokens = [], []
    end = min((part + 1) * PART, len(data))
    for start in range(part * PART, end, batch_size):
        ids_NT = data.ids_NT[start : min(start + batch_size, end)].to(teacher.device)
        logits = teacher(input_ids=ids_NT, use_cache=False).logits[:, :-1].float() / settings.temperature
        best = F.log_softmax(logits, -1).topk(min(settings.top_k, logits.shape[-1]), -1)
        logs.append(best.values.cpu())
        tokens.append(best.indices.int().cpu())
    path = folder / part_name(part)
    save_file({"log": torch.cat(logs), "token": torch.cat(tokens)}, path.with_suffix(".writing"))
    path.with_suffix(".writing").rename(path)


def part_name(part: int) -> str:
    """The file that holds part number `part`."""
    return f"teacher-{part:05d}.safetensors"


def _scored(batch: Sequences) -> torch.Tensor:
    """Places whose next token is part of the loss, N x (T - 1)."""
    return batch.labels_NT[:, 1:] != IGNORED
