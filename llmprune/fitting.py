"""Choosing how a run goes, so that it fits the machine it runs on."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from typing import TYPE_CHECKING

import torch

from llmprune.forecast import Forecast, Probe, Situation
from llmprune.memory import Meter
from llmprune.pipeline import Pruning, schedule_of
from llmprune.progress import Reporter
from llmprune.recipe import Engine
from llmprune.statistics import OF_WEIGHTS
from llmprune.weights import Resident, Streamed

if TYPE_CHECKING:
    from llmprune.job import Job

ENGINE = "engine"  # the journal's line for how a run goes, where that is not what the recipe says


def settle(job: Job, weights: Streamed | Resident, reporter: Reporter, started: float, *, resumed: bool) -> None:
    """Decide on schedule and batch size, and say what the run will take; a resumed run goes on as it was begun."""
    records = job.output.records if job.output is not None else {}
    if ENGINE in records:
        job.use_engine(**{key: records[ENGINE][key] for key in ("schedule", "batch_size")})
    found = None if resumed else _foreseen(job, weights, reporter)
    if found is None:
        return
    found = job.forecast = dataclasses.replace(found, seconds=found.seconds + time.perf_counter() - started)
    reporter.say(str(found))
    if (found.schedule, found.batch_size) != (_schedule(job), job.recipe.engine.batch_size):
        _go_on_with(job, found.schedule, found.batch_size)
        job.notes.append(f"to fit the free memory, schedule {found.schedule} and batches of {found.batch_size}")
        reporter.warn(job.notes[-1])
    if not found.fits:
        advice = "if it fails, give --dtype bfloat16, fewer --samples, or start more processes"
        job.notes.append(f"{found.memory / 2**30:.1f} GiB may not fit the {found.free / 2**30:.1f} GiB free: {advice}")
        reporter.warn(job.notes[-1])


def _foreseen(job: Job, weights: Streamed | Resident, reporter: Reporter) -> Forecast | None:
    """`look_ahead` with as large a batch as the device can take."""
    asked = job.recipe.engine
    while True:
        try:
            return look_ahead(job, weights, asked)
        except torch.OutOfMemoryError:
            if not _can_halve(job):
                raise
        halve_batches(job, weights, reporter)


def look_ahead(job: Job, weights: Streamed | Resident, asked: Engine) -> Forecast | None:
    """Measure the largest layer on one batch, and foresee the run; prunes nothing. What `asked` names is not changed.

    None for a method that reads gradients: what they cost is not foreseen.
    """
    if job.method.needs & OF_WEIGHTS:
        return None
    meter = Meter(job.device)
    probe = Probe(job.plan, weights, job.method, meter, all_experts=job.recipe.calibration.all_experts)
    with torch.no_grad(), contextlib.closing(meter), job.prepared(weights):
        found = probe.run_on(job.model, job.share.batches[0]) if job.runs else probe.run_without_data()
    situation = Situation(
        job.plan,
        job.method,
        job.epochs,
        [one["input_ids"].numel() for one in job.share.batches],
        job.recipe.engine.batch_size,
        hidden=job.model.get_input_embeddings().weight.shape[1] * job.dtype.itemsize,
        layer=sum(one.numel() for one in probe.unit.module.parameters()) * job.dtype.itemsize,
        stored=sum(one.bytes for one in job.checkpoint.entries.values()) if job.checkpoint else 0,
        processes=job.ranks.count,
    )
    chosen = situation.choose(
        found,
        probe.unit,
        _schedule(job),
        job.device,
        schedules=asked.schedule == "auto",
        sizes="batch_size" not in asked.model_fields_set,
    )
    # processes must run alike: as the one that has least room
    everyone = [Forecast(**one) for one in job.ranks.gather(dataclasses.asdict(chosen))]
    return min(everyone, key=lambda one: (one.batch_size, one.schedule == "module", -one.seconds))


def finished(job: Job, pruning: Pruning, weights: Streamed | Resident) -> bool:
    """Prune; False if the device ran out of memory on the way, and smaller batches may help."""
    try:
        if job.runs:
            pruning.run_on(job.model)
        else:
            pruning.run_without_data()
    except torch.OutOfMemoryError:
        # a resident layer may be half pruned
        if not _can_halve(job) or isinstance(weights, Resident):
            raise
        return False
    return True


def halve_batches(job: Job, weights: Streamed | Resident, reporter: Reporter) -> None:
    """After the device ran out of memory: let go of everything on it, and go on with smaller batches."""
    for unit in job.plan.units:
        weights.free(unit)
    if job.device.type != "cpu":
        torch.accelerator.empty_cache()
    _go_on_with(job, _schedule(job), job.recipe.engine.batch_size // 2)
    job.notes.append(f"{job.device} ran out of memory: batches of {job.recipe.engine.batch_size} from there on")
    reporter.warn(job.notes[-1])


def _can_halve(job: Job) -> bool:
    """Whether smaller batches are possible: other processes would wait in their own."""
    return job.recipe.engine.batch_size > 1 and job.ranks.count == 1


def _go_on_with(job: Job, schedule: str, batch_size: int) -> None:
    """Run otherwise than the recipe says, a resumed run too."""
    job.use_engine(schedule=schedule, batch_size=batch_size)
    if job.output is not None:
        job.output.note(ENGINE, {"schedule": schedule, "batch_size": batch_size})


def _schedule(job: Job) -> str:
    return schedule_of(job.recipe, job.method, job.epochs)
