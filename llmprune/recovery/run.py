"""`recover`: one recipe, one finished folder."""

from __future__ import annotations

from pathlib import Path

from llmprune.calibration import OF_THE_DEMO
from llmprune.memory import PeakMemory
from llmprune.progress import Reporter
from llmprune.recovery import make_kind
from llmprune.recovery.recipe import Recovery
from llmprune.result import Result
from llmprune.types import UserError


def recover(
    recipe: Recovery,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Result:
    """Recover the pruned model of a recipe into the folder `out`.

    Raises UserError before anything is written, RunError when the run fails; `resume` then goes on with it.
    """
    reporter = reporter or Reporter(quiet=True)
    if recipe.data.source == "demo":
        reporter.warn(OF_THE_DEMO)
    with PeakMemory() as memory:
        if recipe.how == "blockwise":
            from llmprune.recovery.blockwise import Blockwise

            return Blockwise(recipe, out).run(memory, reporter, resume=resume, overwrite=overwrite)
        kind = make_kind(recipe.how, recipe.options, recipe.seed)
        try:
            from llmprune.recovery.training import TrainingRun
        except ImportError as error:
            raise UserError(f"recovery needs the package {error.name}: pip install 'llmprune[recover]'") from error
        return TrainingRun(recipe, kind, out).run(memory, reporter, resume=resume, overwrite=overwrite)
