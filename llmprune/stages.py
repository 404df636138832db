"""Run a recipe: one job, or several of which each sees the model that the one before has left."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any, TypeAlias

from transformers import PreTrainedModel

from llmprune import ranks
from llmprune.checkpoint.output import REPORT_NAME, Output, write_json
from llmprune.checkpoint.source import resolve
from llmprune.job import Job
from llmprune.memory import PeakMemory
from llmprune.methods import method_class, method_of
from llmprune.narrowing import Narrowing
from llmprune.progress import Reporter
from llmprune.recipe import Recipe, stages_of
from llmprune.restructuring import Restructuring
from llmprune.result import Result
from llmprune.rotating import Rotating
from llmprune.types import UserError

Model: TypeAlias = PreTrainedModel | None
# The job that carries out each kind of method.
KINDS = {"weight": Job, "depth": Restructuring, "expert": Restructuring, "width": Narrowing}


def run(
    recipe: Recipe,
    model: Model,
    tokenizer: Any,
    data: Any,
    out: Path | None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    reporter: Reporter,
) -> Result:
    """Do what the recipe says. Raises UserError before anything is written, RunError when the run fails.

    With stages, models in between lie beside `out` as `OUT.stage1` and so on until all is done; a dry run shows the
    first stage, since the others depend on what it leaves.
    """
    stages = stages_of(recipe)
    if any(getattr(method_of(stage), "split", False) for stage in stages[:-1]):
        raise UserError(
            "split stores an adapter, which the stage or step after it would lose: split in the last stage, in one step"
        )
    if not stages or dry_run:
        return _job(stages[0] if stages else recipe, model, tokenizer, data, out, resume, overwrite, dry_run, reporter)
    if ranks.current().count > 1:
        raise UserError("stages run in one process: start each as a run of its own, or without torchrun")
    if out is not None:
        out = out.expanduser().resolve()
        source = None if model is not None else resolve(recipe.model)
        if resume and (finished := _finished(out, recipe)):
            reporter.say(f"{out} is already finished")
            return Result(finished, out, recipe.trust_remote_code)
        Output(out, "").check(source=source, resume=resume, overwrite=overwrite)
    reports: list[dict[str, Any]] = []
    between: list[Path] = []
    for number, stage in enumerate(stages, 1):
        last = number == len(stages)
        reporter.say(f"stage {number} of {len(stages)}: {stage.method}")
        folder = out if last or out is None else out.with_name(f"{out.name}.stage{number}")
        if model is not None:
            folder = out if last else None
        if between:
            stage = stage.model_copy(update={"model": str(between[-1])})
        result = _job(stage, model, tokenizer, data, folder, resume, overwrite, False, reporter)
        reports.append(result.report)
        if folder is not None and not last:
            between.append(folder)
    report = {**reports[-1], "recipe": recipe.model_dump(mode="json"), "stages": reports}
    report["totals"] = {**report["totals"], "params_before": reports[0]["totals"]["params_before"]}
    if out is not None:
        write_json(out / REPORT_NAME, report)
    for folder in between:
        shutil.rmtree(folder)
    return Result(report, out, recipe.trust_remote_code, model, tokenizer)


def _job(
    recipe: Recipe,
    model: Model,
    tokenizer: Any,
    data: Any,
    out: Path | None,
    resume: bool,
    overwrite: bool,
    dry_run: bool,
    reporter: Reporter,
) -> Result:
    started = time.perf_counter()
    with PeakMemory() as memory:
        method = method_class(recipe.method)
        # a method that turns the hidden state is one for the width, but changes every parameter
        kind = Rotating if hasattr(method, "turn") else KINDS[method.kind]
        if kind is not Job and ranks.current().count > 1:
            raise UserError(f"{recipe.method!r} works in one process: start it without torchrun")
        job = kind(recipe, model, tokenizer, data, out)
        job.check(resume=resume, overwrite=overwrite)
        if dry_run:
            return Result(job.describe_plan(), None)
        try:
            return job.run(reporter, memory, started, resume=resume)
        finally:
            if job.output is not None:
                job.output.close()


def _finished(out: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The report in `out`, if it is of this very recipe."""
    try:
        report: dict[str, Any] = json.loads((out / REPORT_NAME).read_text())
    except (OSError, ValueError):
        return None
    same = isinstance(report, dict) and report.get("recipe") == recipe.model_dump(mode="json")
    return report if same else None
