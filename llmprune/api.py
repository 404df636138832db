"""The Python interface: `prune`; `evaluate` lies in `llmprune.eval.evaluate`."""

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
    "samples": "calibration.samples",
    "seqlen": "calibration.seqlen",
    "batch_size": "engine.batch_size",
    "schedule": "engine.schedule",
    "device": "engine.device",
    "dtype": "engine.dtype",
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
    methods `drop_layers` (how many, or a list of which) and `drop_experts` (fraction).

    Started by `torchrun`, the processes share the work: each must make this call alike.

    Returns the report and the model. Raises UserError for wrong input, before anything is written,
    and RunError when the run fails; what is finished then lies in `OUT.partial` for `resume=True`.
    """
    chosen = {SHORT.get(key, key): value for key, value in settings.items() if value is not None}
    if isinstance(calibration, str):
        chosen["calibration.source"] = calibration
        calibration = None
    if not isinstance(model, PreTrainedModel):
        chosen["model"] = str(model)
        if out is None and not dry_run:
            raise UserError("say where the pruned model goes: out=FOLDER")
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
