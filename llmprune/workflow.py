"""One file from the dense model to the report: prune, recover, eval, report, push, each step done once."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from llmprune import calibration, hub, stages
from llmprune.checkpoint.output import REPORT_NAME, record, write_json
from llmprune.checkpoint.source import Checkpoint, resolve
from llmprune.eval.evaluate import evaluate, task_harness
from llmprune.progress import Reporter
from llmprune.recipe import Recipe, Strict, merge_settings, read_recipe, validated
from llmprune.recovery.recipe import load_recovery
from llmprune.recovery.run import recover
from llmprune.report.page import BUDGET, read_run, write_figures, write_page
from llmprune.result import Result
from llmprune.types import UserError

JOURNAL_NAME = "run.json"


def _as_list(value: Any) -> Any:
    return [one.strip() for one in value.split(",") if one.strip()] if isinstance(value, str) else value


class Evaluation(Strict):
    """What is measured of every model of the run and of the dense one: arguments of `llmprune.evaluate`."""

    perplexity: list[str] = Field(default_factory=list, description="text SPECs")
    seqlen: int | Literal["max"] = 2048
    stride: int | None = None
    max_windows: int | None = None
    bos: Literal["window", "text", "never"] = "window"
    tasks: Annotated[list[str], BeforeValidator(_as_list)] = Field(default_factory=list)
    task_data: str | None = Field(default=None, description="folder with the files of the local tasks")
    limit: float | None = None
    fewshot: int | None = None
    chat_template: bool = False
    seed: int = 0
    prompts: bool | list[str] = False
    batch_size: int = 8
    device: str = "auto"
    dtype: str = "auto"


class Report(Strict):
    """The page about all models of the run."""

    budget: float = Field(default=BUDGET, description="perplexity ratio to dense beyond which the page warns")
    figures: bool = Field(default=False, description="also as files for papers")


class Push(Strict):
    """The last model goes to the Hub: arguments of `llmprune.hub.push`."""

    repo_id: str
    private: bool = True
    revision: str | None = None
    create_pr: bool = False
    base_model: str | None = None
    license: str | None = None


class Workflow(Strict):
    """The sections of the file; all but `prune` may be left out. A section without keys means its defaults."""

    prune: Recipe
    recover: dict[str, Any] | None = Field(default=None, description="a recipe of `llmprune recover`")
    eval: Evaluation | None = None
    report: Report | None = None
    push: Push | None = None

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, data: Any) -> Any:
        return {key: {} if value is None else value for key, value in data.items()} if isinstance(data, dict) else data


def load_workflow(recipe: str | Path | dict[str, Any], settings: dict[str, Any] | None = None) -> Workflow:
    """Read a file (or its content), with settings by dotted key (`prune.sparsity`) over it; raises UserError."""
    data = recipe if isinstance(recipe, dict) else read_recipe(Path(recipe))
    merge_settings(data, settings or {}, Workflow)
    if "prune" not in data:
        raise UserError("the recipe of a run needs a section prune: with the model, the method and the amount")
    return validated(data, Workflow)


def run(
    recipe: str | Path | dict[str, Any],
    *,
    out: str | Path,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    settings: dict[str, Any] | None = None,
) -> Result:
    """Do what a recipe file says, from the dense model to the report; returns the last model.

    `out` gets `pruned/`, `recovered/` and `report.html`. What an earlier, broken-off call has finished is kept, so
    the same call goes on where it stopped, inside a step where the step can. `overwrite` replaces what was made with
    other settings; without it that is an error for models, and measurements are made anew.

    Raises UserError for wrong input, before any work, and RunError when a step fails.
    """
    workflow = load_workflow(recipe, settings)
    _check(workflow)
    folder = Path(out).expanduser().resolve()
    steps = _Steps(folder, reporter or Reporter(quiet=True))
    go_on = {"resume": not overwrite, "overwrite": overwrite}
    pruned, last = folder / "pruned", folder / "pruned"
    asked = workflow.prune
    key = steps.do(
        "prune",
        [asked.model_dump(mode="json"), Checkpoint(resolve(asked.model)).fingerprint()],
        lambda: stages.run(asked, None, None, None, pruned, reporter=steps.reporter, **go_on),
    )
    models = {pruned: key}
    if workflow.recover is not None:
        last = folder / "recovered"
        training = load_recovery(None, {**workflow.recover, "model": str(pruned)})
        models[last] = steps.do(
            "recover",
            [training.model_dump(mode="json", exclude={"model"}), key],
            lambda: recover(training, last, reporter=steps.reporter, **go_on),
        )
    if workflow.eval is not None:
        for model, made in models.items():
            wanted = workflow.eval.model_dump()
            measure = _measurement(model, asked, wanted)
            models[model] = steps.do(f"eval {model.name}", [wanted, made], measure)
    page = workflow.report
    if page is not None:
        steps.do("report", [page.model_dump(), *models.values()], lambda: _report(folder, list(models), page))
    upload = workflow.push
    if upload is not None:
        goal = upload.model_dump()
        steps.do("push", [goal, *models.values()], lambda: hub.push(last, **goal))
    return Result(json.loads((last / REPORT_NAME).read_text()), last, asked.trust_remote_code)


class _Steps:
    """Which steps are done, and with which settings: a key that hashes them and those of the steps before."""

    def __init__(self, folder: Path, reporter: Reporter) -> None:
        self.reporter = reporter
        self._journal = folder / JOURNAL_NAME
        self._done: dict[str, Any] = json.loads(self._journal.read_text()) if self._journal.is_file() else {}

    def do(self, name: str, decides: list[Any], work: Callable[[], Any]) -> str:
        """Do a step unless it is done; returns its key."""
        key = hashlib.sha256(json.dumps([name, *decides], sort_keys=True).encode()).hexdigest()
        if self._done.get(name, {}).get("key") == key:
            self.reporter.say(f"{name}: done before")
            return key
        self.reporter.say(f"{name}: begins")
        started = time.perf_counter()
        work()
        self._done[name] = {"key": key, "seconds": round(time.perf_counter() - started, 1)}
        self._journal.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._journal, self._done)
        return key


def _check(workflow: Workflow) -> None:
    """What can be wrong with the later steps, found before the first begins; raises UserError."""
    if not workflow.prune.model:
        raise UserError("the section prune: needs a model")
    if workflow.recover is not None:
        load_recovery(None, dict(workflow.recover))
    if workflow.eval is not None:
        for spec in workflow.eval.perplexity:
            calibration.read_documents(spec, split="test")
        if workflow.eval.tasks:
            task_harness().manager(workflow.eval.tasks, workflow.eval.task_data)


def _measurement(model: Path, asked: Recipe, wanted: dict[str, Any]) -> Callable[[], None]:
    def measure() -> None:
        found = evaluate(model, baseline=asked.model, trust_remote_code=asked.trust_remote_code, **wanted)
        record(model, "evaluation", found)

    return measure


def _report(folder: Path, models: list[Path], page: Report) -> None:
    runs = [read_run(model) for model in models]
    write_page(folder / "report.html", runs, budget=page.budget)
    if page.figures:
        write_figures(folder / "figures", runs)
