"""One file from the dense model to the report: search, prune, recover, eval, report, push, each step done once."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from llmprune import calibration, hub, stages
from llmprune.checkpoint.output import REPORT_NAME, read_report, record, write_json
from llmprune.checkpoint.source import Checkpoint, resolve
from llmprune.eval.evaluate import Wanted, evaluate
from llmprune.progress import Reporter
from llmprune.recipe import Recipe, Strict, merge_settings, read_recipe, stages_of, validate, validated
from llmprune.record import key_of
from llmprune.recovery.recipe import load_recovery
from llmprune.recovery.run import recover
from llmprune.report.page import BUDGET, read_run, write_figures, write_page
from llmprune.report.searched import read_search
from llmprune.result import Result
from llmprune.searching.asked import Search
from llmprune.searching.find import explore
from llmprune.texts import digest_of
from llmprune.types import RunError, UserError

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
    batch_size: int | Literal["auto"] = 8
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
    search: Search | None = None
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
    data = copy.deepcopy(recipe) if isinstance(recipe, dict) else read_recipe(Path(recipe))
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

    `out` gets `search/`, `pruned/`, `recovered/` and `report.html`; with a budget in the section `search`, the recipe
    that it found is the one that prunes. What an earlier, broken-off call has finished is kept, so the same call goes on
    where it stopped, inside a step where the step can. `overwrite` replaces models that were made with other settings,
    which is an error otherwise; measurements are made anew without asking.

    Raises UserError for wrong input, before any work, and RunError when a step fails.
    """
    workflow = load_workflow(recipe, settings)
    _check(workflow)
    return _Run(workflow, Path(out).expanduser().resolve(), overwrite, reporter or Reporter(quiet=True)).run()


class _Run:
    """The steps of a workflow in a folder, whose journal says which are done, and with which settings."""

    def __init__(self, workflow: Workflow, folder: Path, overwrite: bool, reporter: Reporter) -> None:
        self._workflow, self._folder, self._reporter = workflow, folder, reporter
        self._go_on = {"resume": not overwrite, "overwrite": overwrite}
        self._journal = folder / JOURNAL_NAME
        self._done: dict[str, Any] = json.loads(self._journal.read_text()) if self._journal.is_file() else {}
        self._recipe = workflow.prune
        # the models that there are, in their order, each with the key of the last step that changed it
        self._models: dict[Path, str] = {}

    def run(self) -> Result:
        """Every step that the workflow has and that is not done yet."""
        workflow, folder = self._workflow, self._folder
        pruned, recovered = folder / "pruned", folder / "recovered"
        dense = Checkpoint(resolve(workflow.prune.model)).fingerprint()
        texts = [digest_of(one.calibration.source) for one in stages_of(workflow.prune) or [workflow.prune]]
        found: list[str] = []
        if workflow.search is not None:
            measured = digest_of(workflow.search.perplexity)
            decides = [_plain(workflow.prune), _plain(workflow.search), dense, texts, measured]
            found.append(self._step("search", decides, self._search, (folder / "search").is_dir))
            self._recipe = _found(folder / "search", workflow.prune)
        decides = [_plain(self._recipe), dense, texts]
        key = self._models[pruned] = self._step("prune", decides, self._prune, partial(_says, pruned, "fingerprint"))
        if workflow.recover is not None:
            trained = digest_of(load_recovery(None, dict(workflow.recover)).data.source)
            is_there = partial(_says, recovered, "fingerprint")
            self._models[recovered] = self._step("recover", [workflow.recover, key, trained], self._recover, is_there)
        for model, key in self._models.items():
            if workflow.eval is not None:
                decides = [_plain(workflow.eval), key, *map(digest_of, workflow.eval.perplexity)]
                measure, is_there = partial(self._measure, model), partial(_says, model, "evaluation")
                self._models[model] = self._step(f"eval {model.name}", decides, measure, is_there)
        made = [*found, *self._models.values()]
        if workflow.report is not None:
            page = folder / "report.html"
            self._step("report", [_plain(workflow.report), *made], self._report, page.is_file)
        if workflow.push is not None:
            self._step("push", [_plain(workflow.push), *made], self._push, lambda: True)
        last = list(self._models)[-1]
        return Result(json.loads((last / REPORT_NAME).read_text()), last, self._recipe.trust_remote_code)

    def _step(self, name: str, decides: list[Any], work: Callable[[], object], is_there: Callable[[], bool]) -> str:
        """Do a step unless it is done, and its result is there; returns its key, a hash of all that decides it."""
        key = key_of([name, *decides])
        if self._done.get(name, {}).get("key") == key and is_there():
            self._reporter.say(f"{name}: done before")
            return key
        self._reporter.say(f"{name}: begins")
        started = time.perf_counter()
        work()
        self._done[name] = {"key": key, "seconds": round(time.perf_counter() - started, 1)}
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(self._journal, self._done)
        return key

    def _search(self) -> None:
        assert self._workflow.search is not None
        explore(self._workflow.prune, self._workflow.search, self._folder / "search", self._reporter)

    def _prune(self) -> None:
        stages.run(self._recipe, None, None, None, self._folder / "pruned", reporter=self._reporter, **self._go_on)

    def _recover(self) -> None:
        training = load_recovery(None, {**(self._workflow.recover or {}), "model": str(self._folder / "pruned")})
        recover(training, self._folder / "recovered", reporter=self._reporter, **self._go_on)

    def _measure(self, model: Path) -> None:
        assert self._workflow.eval is not None
        dense, trust = self._recipe.model, self._recipe.trust_remote_code
        found = evaluate(model, baseline=dense, trust_remote_code=trust, **self._workflow.eval.model_dump())
        record(model, "evaluation", found)

    def _report(self) -> None:
        page = self._workflow.report
        assert page is not None
        runs = [read_run(model) for model in self._models]
        searches = [read_search(self._folder / "search")] if self._workflow.search is not None else []
        write_page(self._folder / "report.html", runs, searches, budget=page.budget)
        if page.figures:
            write_figures(self._folder / "figures", runs, searches)

    def _push(self) -> None:
        assert self._workflow.push is not None
        done = hub.push(list(self._models)[-1], **self._workflow.push.model_dump())
        for note in done["notes"]:
            self._reporter.warn(note)


def _plain(settings: Strict) -> dict[str, Any]:
    return settings.model_dump(mode="json")


def _says(model: Path, key: str) -> bool:
    """Whether the report of a finished model has an entry."""
    return key in (read_report(model) or {})


def _check(workflow: Workflow) -> None:
    """What can be wrong with the later steps, found before the first begins; raises UserError."""
    if not workflow.prune.model:
        raise UserError("the section prune: needs a model")
    if workflow.recover is not None:
        calibration.read_rows(load_recovery(None, dict(workflow.recover)).data.source)
    if workflow.eval is not None:
        wanted = Wanted.read(**workflow.eval.model_dump(exclude={"device", "dtype"}))
        dense = resolve(workflow.prune.model)
        wanted.check_tokenizer(calibration.load_tokenizer(dense, workflow.prune.trust_remote_code))


def _found(folder: Path, base: Recipe) -> Recipe:
    """The recipe that a search came to, or that it began with if it sought no budget; raises RunError."""
    budget = read_search(folder).get("budget")
    if budget is None:
        return base
    if budget["best"] is None:
        raise RunError(f"no model is within the budget {budget['asked']}: see {folder}")
    return validate(budget["best"]["recipe"])
