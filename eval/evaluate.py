"""`llmprune.evaluate`: everything that is asked of a model, and of the dense one beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from llmprune.calibration import read_documents
from llmprune.eval.agreement import PROMPTS, agreement, write
from llmprune.eval.perplexity import check_batch, check_windows, measure, open_model
from llmprune.types import UserError

# Options of `perplexity.cut` and of `harness.measure`, told apart by name.
WINDOWS = ("seqlen", "stride", "max_windows", "bos")
HARNESS = ("limit", "fewshot", "chat_template", "seed")


def evaluate(
    model: str | Path | PreTrainedModel,
    *,
    perplexity: str | Sequence[str] = (),
    tasks: str | Sequence[str] = (),
    baseline: str | Path | PreTrainedModel | None = None,
    prompts: bool | Sequence[str] = False,
    tokenizer: Any = None,
    task_data: str | Path | None = None,
    batch_size: int | Literal["auto"] = 8,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Measure a model: a folder, a Hub id, or a loaded model with its `tokenizer`.

    `perplexity`: text SPECs, with `seqlen`, `stride`, `max_windows` and `bos` (see `eval.perplexity.cut`).
    `tasks`: lm-eval tasks, or local ones over files in `task_data`, with `limit`, `fewshot`, `chat_template`
    and `seed`. `prompts`: texts to go on from (True: a fixed few). `baseline`: the dense model; what is
    measured of the one is measured of the other, and `comparison` holds the perplexity ratio, KL, top-1
    agreement, and paired tests. `batch_size`: windows or requests at once; "auto": as many as memory allows. Raises
    UserError.
    """
    wanted = Wanted.read(
        perplexity=perplexity, tasks=tasks, prompts=prompts, task_data=task_data, batch_size=batch_size, **options
    )
    place: Any = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    opened = open_model(model, tokenizer, **place)
    # opened before anything is measured: a wrong name must not cost an evaluation
    dense = None if baseline is None else open_model(baseline, tokenizer, **place)
    for _, words in (opened, dense or opened):
        wanted.check_tokenizer(words)
    found, samples = wanted.of(*opened)
    result = {"model": _name(model), **found}
    if baseline is not None and dense is not None:
        measured, dense_samples = wanted.of(*dense)
        result["baseline"] = {"model": _name(baseline), **measured}
        result["comparison"] = {
            "perplexity": {
                spec: {
                    "ratio": found["perplexity"][spec]["ppl"] / measured["perplexity"][spec]["ppl"],
                    **agreement(opened[0], dense[0], opened[1], spec, batch_size=batch_size, **wanted.windows),
                }
                for spec in wanted.specs
            },
            "tasks": task_harness().compare(samples, dense_samples) if wanted.tasks else {},
        }
    return result


@dataclass(frozen=True)
class Wanted:
    """What is to be measured, of whichever model. `read` takes arguments of `evaluate`."""

    specs: list[str]
    tasks: list[str]
    prompts: list[str]
    windows: dict[str, Any]
    settings: dict[str, Any]
    folder: str | Path | None
    batch_size: int | Literal["auto"]

    @classmethod
    def read(
        cls,
        *,
        perplexity: str | Sequence[str] = (),
        tasks: str | Sequence[str] = (),
        prompts: bool | Sequence[str] = False,
        task_data: str | Path | None = None,
        batch_size: int | Literal["auto"] = 8,
        **options: Any,
    ) -> Wanted:
        """Raises UserError for all that is wrong with it whatever the model: texts and task files are read, too."""
        specs, names = _listed(perplexity), _listed(tasks)
        asked = list(PROMPTS) if prompts is True else [] if prompts is False else list(prompts)
        unknown = sorted(set(options) - {*WINDOWS, *HARNESS})
        if unknown:
            raise UserError(f"unknown option {unknown[0]!r} (known: {', '.join((*WINDOWS, *HARNESS))})")
        if not specs and not names and not asked:
            raise UserError("say what to measure: perplexity=['file:text.txt'], tasks=['local_piqa'], or prompts=True")
        windows = {key: options[key] for key in WINDOWS if key in options}
        settings = {key: options[key] for key in HARNESS if key in options}
        check_windows(**windows)
        _check_settings(**settings)
        check_batch(batch_size)
        for spec in specs:
            read_documents(spec, split="test")
        if names:
            task_harness().check(names, task_data)
        return cls(specs, names, asked, windows, settings, task_data, batch_size)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Whether it has the chat template that is asked for; raises UserError."""
        if self.tasks and self.settings.get("chat_template") and not tokenizer.chat_template:
            raise UserError("chat_template is asked for, and the model's tokenizer has none: leave it out")

    def of(self, model: PreTrainedModel, tokenizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The result for one model, and lm-eval's samples for the paired tests."""
        texts = {
            spec: measure(model, tokenizer, spec, batch_size=self.batch_size, **self.windows) for spec in self.specs
        }
        result: dict[str, Any] = {"perplexity": texts}
        samples: dict[str, Any] = {}
        if self.tasks:
            result["tasks"], samples = task_harness().measure(
                model, tokenizer, self.tasks, batch_size=self.batch_size, folder=self.folder, **self.settings
            )
        if self.prompts:
            written = write(model, tokenizer, self.prompts)
            rows = zip(self.prompts, written, strict=True)
            result["generation"] = [{"prompt": prompt, "text": text} for prompt, text in rows]
        return result, samples


def _check_settings(*, limit: float | None = None, fewshot: int | None = None, seed: int = 0, **_: Any) -> None:
    """What is wrong with settings of lm-eval for any task and model; raises UserError."""
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and float(limit).is_integer())):
        raise UserError(f"limit {limit:g} must be a whole number of rows, or a share above 0 and below 1")
    if fewshot is not None and fewshot < 0:
        raise UserError(f"fewshot {fewshot} must be at least 0")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed {seed} must lie between 0 and {2**32 - 1}")


def _listed(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _name(model: str | Path | PreTrainedModel) -> str:
    return str(model) if isinstance(model, str | Path) else type(model).__name__


def task_harness() -> Any:
    """The module that runs tasks; raises UserError if lm-eval is not installed."""
    try:
        from llmprune.eval import harness
    except ImportError as error:
        raise UserError(f"tasks need lm-eval ({error.name}): pip install 'llmprune[eval]'") from error
    return harness
