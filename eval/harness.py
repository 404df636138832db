"""lm-eval on our models: the model class `llmprune`, tasks over local files, and a paired test between two models.

`python -m llmprune.eval.harness --model llmprune --model_args pretrained=DIR …` registers the class and the
local tasks, and hands over to lm-eval's own command line.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval.tasks
import torch
from lm_eval import evaluator
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel

from llmprune.eval.perplexity import open_model
from llmprune.eval.significance import label, paired
from llmprune.recipe import nearest
from llmprune.types import UserError

TASKS = Path(__file__).parent / "tasks"
OURS = "local_"
# Draws for the standard errors that have no closed form. lm-eval's default of 100 000 needs its process pool,
# which deadlocks where torch already runs threads, so it is switched off (by the only switch there is).
BOOTSTRAP = 200
NO_POOL = "DISABLE_MULTIPROC"


@register_model("llmprune")
class PrunedLM(HFLM):  # type: ignore[misc]
    """A model folder, Hub id or loaded model for lm-eval; `sparse=True` runs N:M layers on the sparse kernels.

    Everything that lm-eval's own `hf` model takes (batch_size, max_length, add_bos_token, …) is passed on.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        *,
        tokenizer: Any = None,
        sparse: bool = False,
        dtype: str = "auto",
        device: str = "auto",
        trust_remote_code: bool = False,
        **options: Any,
    ) -> None:
        # "cuda:0" is what lm-eval's command line says when its user says nothing; its own `hf` reads it likewise
        place = "auto" if device == "cuda:0" and not torch.cuda.is_available() else device
        model, words = open_model(
            pretrained, tokenizer, dtype=dtype, device=place, trust_remote_code=trust_remote_code, sparse=sparse
        )
        super().__init__(pretrained=model, backend="causal", tokenizer=words, **options)
        # what lm-eval records as the model
        self.pretrained = pretrained if isinstance(pretrained, str) else type(model).__name__


def manager(names: list[str], folder: str | Path | None = None) -> TaskManager:
    """lm-eval's task manager with ours added; raises UserError for a name that neither knows.

    `folder`: where the files of the local tasks lie.
    """
    # reading lm-eval's thousands of task files takes seconds
    theirs = not all(name.startswith(OURS) for name in names)
    metadata: Any = {} if folder is None else {"folder": str(folder)}
    found = TaskManager(include_path=str(TASKS), include_defaults=theirs, metadata=metadata)
    for name in names:
        if name not in found.all_tasks:
            ours = [one for one in found.all_tasks if one.startswith(OURS)]
            raise UserError(f"unknown task {name!r}{nearest(name, ours)}; lm-eval's own: python -m lm_eval ls tasks")
    return found


def check(tasks: list[str], folder: str | Path | None = None) -> None:
    """Load tasks with their data, to find what is wrong with them before a model is loaded; raises UserError."""
    known = manager(tasks, folder)
    with _quietly(), _data_of(tasks):
        known.load(tasks)


def measure(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: list[str],
    *,
    limit: float | None = None,
    fewshot: int | None = None,
    batch_size: int | str = "auto",
    chat_template: bool = False,
    seed: int = 0,
    folder: str | Path | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run tasks. Returns a row per task (metrics, standard errors and protocol), and lm-eval's samples.

    Raises UserError for unknown tasks, and for a data set that can be had neither from a folder nor from the Hub.
    """
    known = manager(tasks, folder)
    with _quietly(), _data_of(tasks):
        found = simple_evaluate(
            model=PrunedLM(model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            num_fewshot=fewshot,
            limit=limit,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
            task_manager=known,
            bootstrap_iters=BOOTSTRAP,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    protocol = {"chat_template": chat_template, "seed": seed, "dtype": str(model.dtype).removeprefix("torch.")}
    rows = {name: {**_row(name, values, found), **protocol} for name, values in found["results"].items()}
    return rows, found["samples"]


def _row(task: str, values: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """One task: lm-eval's `acc,none` and `acc_stderr,none` as `acc` and `stderr: {acc}`, and the protocol."""
    metrics: dict[str, Any] = {}
    errors: dict[str, Any] = {}
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if not comma:
            continue
        name = label(metric.removesuffix("_stderr"), filtered)
        if metric.endswith("_stderr"):
            errors[name] = value if isinstance(value, float) else None
        else:
            metrics[name] = value
    return {
        **metrics,
        "stderr": errors,
        "n": found["n-samples"].get(task, {}).get("effective"),
        "fewshot": found["n-shot"].get(task),
        "version": found["versions"].get(task),
    }


def compare(samples: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Any]:
    """Per task and metric: the difference to the baseline on the same rows, its standard error, and a paired p."""
    return {name: paired(samples[name], baseline[name]) for name in samples if name in baseline}


@contextlib.contextmanager
def _data_of(tasks: list[str]) -> Iterator[None]:
    """Turn what is raised where data cannot be had into our error."""
    try:
        yield
    except (FileNotFoundError, ConnectionError) as error:
        raise UserError(
            f"the data of {', '.join(tasks)} cannot be had: {error}. The tasks local_… read files of yours"
        ) from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """While active, lm-eval keeps to this process, and says only what went wrong, on stderr: stdout is our result's."""
    logger = logging.getLogger("lm_eval")
    level, pool, commit = logger.level, os.environ.get(NO_POOL), evaluator.get_git_commit_hash
    logger.setLevel(logging.ERROR)
    os.environ[NO_POOL] = "1"
    # it asks git, which complains outside a repository
    evaluator.get_git_commit_hash = lambda: None
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        evaluator.get_git_commit_hash = commit
        logger.setLevel(level)
        if pool is None:
            del os.environ[NO_POOL]


class _WithOurs(TaskManager):  # type: ignore[misc]
    """lm-eval's task manager with the local tasks, beside those of the user's own `include_path`, which win."""

    def __init__(self, *, include_path: Any = None, **options: Any) -> None:
        theirs = include_path if isinstance(include_path, list | tuple) else [include_path] if include_path else []
        super().__init__(include_path=[TASKS, *theirs], **options)


def main() -> None:
    """lm-eval's command line with the model `llmprune` and the local tasks in it."""
    # its commands take the class from there when they run
    lm_eval.tasks.TaskManager = _WithOurs
    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        lm_eval.tasks.TaskManager = TaskManager


if __name__ == "__main__":
    main()
