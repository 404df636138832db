"""Every layer solved at several amounts on the dense model's inputs, kept on disk, to be put together at will."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from llmprune.job import Job
from llmprune.level_store import LevelStore
from llmprune.methods import epochs_of
from llmprune.plan import select_matrices
from llmprune.progress import Reporter
from llmprune.recipe import Recipe
from llmprune.searching.asked import recipe_at
from llmprune.statistics import DRIFT, OF_WEIGHTS, Stats
from llmprune.types import Matrix, MatrixSpec, UserError
from llmprune.weights import Streamed, swapped

# Of a fingerprint, in the name of a folder.
DIGITS = 16


class Levels:
    """The layers of a model at each of some amounts, by one method: a file a layer and amount, of stored dtype.

    A layer alone has exactly the weights of a run that prunes only this layer (schedule `layer`); several together lack
    what a run adds, that later layers see the pruned ones before them.

    `base`: the recipe but for the amount; `dense` gives the loaded model in which layers are put together. Raises
    UserError for a method whose solution depends on other layers or on gradients, and if the disk is too small.
    """

    def __init__(
        self,
        folder: Path,
        base: Recipe,
        amounts: list[str],
        dense: Callable[[], tuple[PreTrainedModel, Any]],
        reporter: Reporter,
    ) -> None:
        # the amount is only there to make it a whole recipe: it must not decide the fingerprint
        self._job = Job(base, None, None, None, None)
        if self._job.method.needs & (OF_WEIGHTS | {DRIFT}) or epochs_of(base):
            raise UserError(
                f"{base.method!r} also needs the dense model's outputs or gradients, so its layers cannot be solved one by one; "
                "scan, or search for a budget, with a plain method such as admm or sparsegpt"
            )
        self._recipes = {amount: recipe_at(base, base.method, amount) for amount in amounts}
        self._dense, self._reporter = dense, reporter
        self._store = LevelStore(folder / self._job.fingerprint()[:DIGITS])
        # what a report says of the text behind the layers, None if the method reads none
        self.calibration = self._job.tokens.describe() if self._job.tokens else None
        self.layers = [unit.name for unit in self._job.plan.chosen_units()]

    def build(self) -> None:
        """Solve what is not there yet, with one pass of the calibration text through the dense model."""
        missing = {
            amount: recipe
            for amount, recipe in self._recipes.items()
            if not all(self._store.has(amount, number) for number in range(len(self.layers)))
        }
        if not missing:
            return
        job = self._job
        budgets = {amount: job.budgets(recipe) for amount, recipe in missing.items()}
        assert job.checkpoint is not None
        weights = Streamed(job.model, job.checkpoint, None, job.plan.units, job.dtype, job.device)
        size = sum(spec.count * weights.storage_dtype(spec.parameter).itemsize for spec in job.plan.specs())
        self._store.make_room(len(missing), size)

        def solve(number: int, matrices: Iterable[tuple[MatrixSpec, torch.Tensor, Stats | None]]) -> None:
            open_amounts = [amount for amount in missing if not self._store.has(amount, number)]
            found: dict[str, dict[str, torch.Tensor]] = {amount: {} for amount in open_amounts}
            for spec, weight_OI, stats in matrices:
                for amount in open_amounts:
                    edit = job.method.solve(Matrix(spec.name, weight_OI), stats, budgets[amount][spec.name])
                    found[amount][spec.name] = _stored(edit.weight_OI.masked_fill(edit.pruned_OI, 0), spec, weights)
            for amount, tensors in found.items():
                self._store.save(amount, number, tensors)
            self._reporter.say(f"{job.recipe.method}: {self.layers[number]} solved at {', '.join(open_amounts)}")

        dense = job.dense()
        with torch.no_grad():
            if job.method.needs:
                dense.measure(job.method.needs, lambda number, matrices: solve(number, matrices()))
                return
            numbers = {spec.name: number for number, layer in enumerate(dense.layers) for spec in layer}
            for number, pairs in groupby(dense.weights(), key=lambda pair: numbers[pair[0].name]):
                solve(number, ((spec, weight_OI, None) for spec, weight_OI in pairs))

    @contextmanager
    def put(self, numbers: Iterable[int], amount: str) -> Iterator[tuple[PreTrainedModel, Any]]:
        """The loaded model and its tokenizer, these layers (from 0, among the pruned ones) at an amount, until left."""
        self.build()
        model, tokenizer = self._dense()
        units = select_matrices(model, self._job.recipe).chosen_units()
        with ExitStack() as stack:
            for number in numbers:
                stack.enter_context(swapped(units[number], self._store.load(amount, number)))
            yield model, tokenizer


def remove_levels(folder: Path) -> None:
    """Remove what searches have put there, those that were broken off included, and the folder if it is then empty."""
    for store in folder.glob("[0-9a-f]" * DIGITS):
        shutil.rmtree(store, ignore_errors=True)
    with suppress(OSError):
        folder.rmdir()


def _stored(weight_OI: torch.Tensor, spec: MatrixSpec, weights: Streamed) -> torch.Tensor:
    """A matrix as its parameter holds it."""
    laid_out = weight_OI.T if spec.transposed else weight_OI
    return laid_out.to("cpu", weights.storage_dtype(spec.parameter)).contiguous()
