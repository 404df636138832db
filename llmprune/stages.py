"""Run a recipe: one job, or several of which each sees the model that the one before has left."""

from __future__ import annotations

import copy
import shutil
import time
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel

from llmprune import ranks
from llmprune.checkpoint.output import REPORT_NAME, Output, read_report, write_json
from llmprune.checkpoint.skeleton import build_skeleton, load_config
from llmprune.checkpoint.source import Checkpoint, resolve
from llmprune.inspection import zeros_of_layers
from llmprune.job import Job
from llmprune.memory import PeakMemory
from llmprune.methods import hidden_of, method_class, method_of
from llmprune.narrowing import Narrowing
from llmprune.progress import Reporter
from llmprune.recipe import Recipe, stages_of
from llmprune.restructuring import Restructuring
from llmprune.result import Result
from llmprune.rotating import Rotating
from llmprune.two_ways import TwoWays, in_two_ways
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

    With stages, models in between lie beside `out` as `OUT.stage1` and so on until all is done (`OUT.hidden1` where the
    hidden state is cut first); a dry run shows the first stage, since the others depend on what it leaves.
    """
    stages, word = stages_of(recipe), "stage"
    if not stages and hidden_of(recipe) > 0:
        ways = _in_two_ways(recipe, model)
        if ways.first is None:
            reporter.say(f"the hidden state stays as it is: {ways.alone}")
            recipe = ways.then
        else:
            # a stage may itself be of two ways, and then goes on from a folder of that name
            stages, word = [ways.first, ways.then], "hidden"
    if not stages or dry_run:
        return _job(stages[0] if stages else recipe, model, tokenizer, data, out, resume, overwrite, dry_run, reporter)
    if ranks.current().count > 1:
        raise UserError("stages run in one process: start each as a run of its own, or without torchrun")
    _check(stages)
    between: list[Path] = []
    if out is not None:
        out = out.expanduser().resolve()
        source = None if model is not None else resolve(recipe.model)
        if resume and (finished := _finished(out, recipe)):
            reporter.say(f"{out} is already finished")
            return Result(finished, out, recipe.trust_remote_code)
        if model is None:
            between = [out.with_name(f"{out.name}.{word}{number}") for number in range(1, len(stages))]
        # a run that was killed at its very end has the output of its last stage, but not yet the joined report
        ended = resume and between and _finished(out, _reading(stages[-1], between[-1]))
        # on resuming, only the stage itself can tell whether what lies in its folder is its own
        for written in ([] if resume else between) + ([] if ended else [out]):
            Output(written, "").check(source=source, resume=resume, overwrite=overwrite)
    folders: list[Path | None] = [*between, out] if between else [*[None] * (len(stages) - 1), out]
    reports: list[dict[str, Any]] = []
    for number, (stage, folder) in enumerate(zip(stages, folders, strict=True), 1):
        reporter.say(f"stage {number} of {len(stages)}: {stage.method}")
        if number > 1 and between:
            stage = _reading(stage, between[number - 2])
        result = run(stage, model, tokenizer, data, folder, resume=resume, overwrite=overwrite, reporter=reporter)
        reports.append(result.report)
        if model is not None:  # some stages make a new one
            model = result.model
    if model is None:
        assert out is not None
        zeros = zeros_of_layers(Checkpoint(out).tensors())
    else:
        zeros = zeros_of_layers(model.named_parameters())
    report = _joined(recipe, reports, zeros)
    if out is not None:
        write_json(out / REPORT_NAME, report)
    for one in between:
        shutil.rmtree(one)
    return Result(report, out, recipe.trust_remote_code, model, tokenizer)


def _reading(stage: Recipe, folder: Path) -> Recipe:
    return stage.model_copy(update={"model": str(folder)})


def _in_two_ways(recipe: Recipe, model: Model) -> TwoWays:
    """How the hidden state and what a width method takes out share the amount, from the configuration alone."""
    if model is not None:
        return in_two_ways(recipe, model, copy.deepcopy(model.config))
    trust = recipe.trust_remote_code
    config = load_config(str(resolve(recipe.model)), trust_remote_code=trust)
    return in_two_ways(recipe, build_skeleton(copy.deepcopy(config), torch.float32, trust_remote_code=trust), config)


def _check(stages: list[Recipe]) -> None:
    """What is wrong with any of the stages, as far as it can be said before the first; raises UserError."""
    methods = [method_of(stage) for stage in stages]
    for stage, method in zip(stages, methods, strict=True):
        _kind(method).check_amount(stage, method)
    if any(getattr(method, "split", False) for method in methods[:-1]):
        raise UserError(
            "split stores an adapter, which the stage or step after it would lose: split in the last stage, in one step"
        )


def _joined(recipe: Recipe, reports: list[dict[str, Any]], zeros: int) -> dict[str, Any]:
    """The report of the last stage, with what is to be said of all of them, and theirs under `stages`."""
    last, runs = reports[-1], [one["run"] for one in reports]
    peaks = [one["peak_memory"] for one in runs]
    return {
        **last,
        "recipe": recipe.model_dump(mode="json"),
        "warnings": list(dict.fromkeys(warning for one in reports for warning in one["warnings"])),
        "totals": {**last["totals"], "params_before": reports[0]["totals"]["params_before"], "zeros": zeros},
        "run": {
            **last["run"],
            "seconds": sum(one["seconds"] for one in runs),
            "peak_memory": {key: max(one[key] for one in peaks) for key in peaks[-1]},
            "notes": list(dict.fromkeys(note for one in runs for note in one["notes"])),
        },
        "stages": [stage for one in reports for stage in one.get("stages", [one])],
    }


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
        kind = _kind(method_class(recipe.method))
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


def _kind(method: Any) -> type[Job]:
    """The job that carries out a method; one that turns the hidden state is for the width, but changes every parameter."""
    return Rotating if hasattr(method, "turn") else KINDS[method.kind]


def _finished(out: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The report in `out`, if it is of this very recipe."""
    report = read_report(out)
    return report if report and report.get("recipe") == recipe.model_dump(mode="json") else None
