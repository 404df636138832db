"""The Python interface: `prune` and `recover`; `evaluate` lies in `llmprune.eval.evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from llmprune import ranks, stages
from llmprune.progress import Reporter
from llmprune.recipe import load_recipe
from llmprune.result import Result
from llmprune.types import UserError

# Short names of the recipe keys that people set most; everything else goes by its dotted key.
SHORT = {
    "calibration": "calibration.source",
    "samples": "calibration.samples",
    "seqlen": "calibration.seqlen",
    "batch_size": "engine.batch_size",
    "schedule": "engine.schedule",
    "device": "engine.device",
    "dtype": "engine.dtype",
}
SHORT_RECOVERY = {
    "seqlen": "data.seqlen",
    "teacher": "distill.teacher",
    "steps": "training.steps",
    "epochs": "training.epochs",
    "minutes": "training.minutes",
    "batch_size": "training.batch_size",
    "learning_rate": "training.learning_rate",
}


def prune(
    model: str | Path | PreTrainedModel,
    *,
    out: str | Path | None = None,
    recipe: str | Path | None = None,
    tokenizer: Any = None,
    calibration: Any = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    reporter: Reporter | None = None,
    **settings: Any,
) -> Result:
    """Prune a causal language model.

    `model`: a folder, a Hub id (`@REVISION` allowed), or a loaded model, which is changed in place.
    `out`: the folder to write; needed for a path, optional for a loaded model. `calibration`: a text
    SPEC, or token ids as lists, tensors or dicts with `input_ids` and `attention_mask`. `settings` are
    recipe keys: `method`, `sparsity` (fraction of zeros), `pattern` ("2:4" keeps 2 of 4), `samples`,
    `seqlen`, `batch_size`, `schedule`, `targets`, `ignore`, `seed`, `options` and the rest; for depth and expert
    methods `drop_layers` (how many, or a list of which) and `drop_experts` (fraction). `reporter`:
    `llmprune.progress.Reporter()` shows progress and warnings on stderr; by default the warnings are in the report alone.

    Started by `torchrun`, the processes share the work: each must make this call alike.

    Returns the report and the model. Raises UserError for wrong input, before anything is written,
    and RunError when the run fails; what is finished then lies in `OUT.partial` for `resume=True`.
    """
    if isinstance(calibration, str):
        settings["calibration"], calibration = calibration, None
    chosen = {SHORT.get(key, key): value for key, value in settings.items() if value is not None}
    if not isinstance(model, str | Path | PreTrainedModel):
        raise UserError(
            f"the model must be a folder, a Hub id or a loaded model of transformers, not {type(model).__name__}"
        )
    if not isinstance(model, PreTrainedModel):
        chosen["model"] = str(model)
        if out is None and not dry_run:
            raise UserError("say where the pruned model goes: --out FOLDER, or out= in Python")
    with ranks.current().together():
        ready = load_recipe(Path(recipe) if recipe else None, chosen)
        return stages.run(
            ready,
            None if isinstance(model, str | Path) else model,
            tokenizer,
            calibration,
            None if out is None else Path(out),
            resume=resume,
            overwrite=overwrite,
            dry_run=dry_run,
            reporter=reporter or Reporter(quiet=True),
        )


def recover(
    model: str | Path,
    *,
    out: str | Path,
    data: str | None = None,
    recipe: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    **settings: Any,
) -> Result:
    """Win back what pruning cost, with the same zeros.

    `model`: the folder of a pruned model. `out`: the folder to write. `data`: SPEC of the text or the instructions to
    train on, whose last part is held out. `settings` are recipe keys: `how` ("blockwise", "finetune", "distill",
    "lora", "masked", "spp", "merge-then-mask", "gradual", "movement", "sheared", "compresso", "loraprune",
    "lorashear", "splora", "apt"), `teacher` (the dense model), `steps`, `epochs`, `minutes`, `batch_size`, `learning_rate`, `seqlen`, `seed`,
    and the rest.

    Returns the report and the model. Raises UserError for wrong input, before anything is written, and RunError when
    the run fails; what is finished then lies in `OUT.partial` for `resume=True`.
    """
    from llmprune.recovery.recipe import load_recovery
    from llmprune.recovery.run import recover as run

    chosen = {SHORT_RECOVERY.get(key, key): value for key, value in settings.items() if value is not None}
    chosen["model"] = str(model)
    if data is not None:
        chosen["data.source"] = data
    ready = load_recovery(Path(recipe) if recipe else None, chosen)
    return run(ready, Path(out), resume=resume, overwrite=overwrite, reporter=reporter)
