"""Gradients of all matrices of a model, on disk until a matrix is scored.

They lie in the system's folder for temporary files (TMPDIR): two float32 values a weight, four with the Hessian's, 34
with those of a block Fisher; of the gradients at outputs, a square of the outputs for every matrix.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from llmprune.arch.discover import Unit, expert_blocks, find_units
from llmprune.checkpoint.layer_lists import refuse_shared_layers
from llmprune.engine.curvature import output_grams
from llmprune.engine.flow import flow_gradients
from llmprune.engine.gradients import Found, loss_gradients, regional_gradients
from llmprune.engine.trunk import Trunk
from llmprune.memory import within_reach
from llmprune.statistics import CURVATURE, FISHER, FLOW, OF_WEIGHTS, REGIONAL, TURNED
from llmprune.temporary import check_room, save
from llmprune.types import FISHER_BLOCK, Gradient, Matrix, MatrixSpec, UserError
from llmprune.weights import Loads

# Takes gradients of the named parameters of every layer.
Passes = Callable[[Trunk, Sequence[Sequence[str]]], Iterator[tuple[int, Found]]]
# By kind, where it is not `loss_gradients`.
PASSES: dict[str, Passes] = {
    REGIONAL: regional_gradients,
    FLOW: flow_gradients,
    FISHER: partial(loss_gradients, blocks=True),
}
# How far weights are moved along the gradient for a central difference, as a share of their norm. The error grows
# with its square, but the share that float32 loses with its inverse.
STEP = 1e-3


def check_gradients(
    name: str, kinds: frozenset[str], model: PreTrainedModel, units: list[Unit], device: torch.device
) -> None:
    """Whether the method `name`, which needs `kinds`, can take gradients in these units; raises UserError."""
    refuse_shared_layers(model.config)
    if len(units) > len(find_units(model, head=False)):
        raise UserError(f"{name!r} takes gradients in decoder layers: leave out the output head")
    if FLOW in kinds and any(True for unit in units for _ in expert_blocks(unit.module)):
        raise UserError(f"{name!r} follows one input, and a router sends that to few of the experts")
    if FLOW not in kinds and model.dtype == torch.float16:
        raise UserError(f"gradients underflow in float16, so {name!r} needs another engine.dtype")
    if TURNED in kinds and model.dtype != torch.float32:
        raise UserError(f"{name!r} takes differences of gradients: set engine.dtype to float32")
    if FISHER in kinds:
        _check_memory(name, units, device)
    what, advice = "the gradients of all matrices", ""
    if FISHER in kinds:
        what = f"{FISHER_BLOCK} products of gradients a weight"
        advice = ", or use 'fisher', which keeps their diagonal"
    for kind in kinds & OF_WEIGHTS:
        check_room(f"{name!r} keeps {what}", _kept(kind, units), advice)


def _kept(kind: str, units: list[Unit]) -> int:
    """Bytes of all that is taken of these units."""
    specs = [spec for unit in units for spec in unit.matrices]
    if kind == CURVATURE:
        return 4 * sum(spec.outputs**2 for spec in specs)
    return 4 * {TURNED: 4, FISHER: FISHER_BLOCK + 2}.get(kind, 2) * sum(spec.count for spec in specs)


def _check_memory(name: str, units: list[Unit], device: torch.device) -> None:
    """Whether the block Fisher of the largest layer fits into memory; raises UserError."""
    needed = max(sum(spec.count for spec in unit.matrices) for unit in units) * (FISHER_BLOCK + 4) * 4
    free = within_reach(device)
    if needed > free:
        raise UserError(
            f"{name!r} keeps {FISHER_BLOCK} products of gradients a weight, {needed / 2**30:.1f} GiB: {device} has "
            f"{free / 2**30:.1f} GiB free; use 'fisher', which keeps their diagonal"
        )


class Gradients:
    """What `types.Matrix` says of some matrices beside their weights, all of it taken when this is made.

    `batches`: one sequence each; for `FLOW` a single token, whose identity does not matter. `kind`: of
    `statistics.OF_WEIGHTS`. `weights`: the dense ones.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        units: list[Unit],
        batches: list[dict[str, Any]],
        weights: Loads,
        specs: Sequence[MatrixSpec],
        kind: str,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="llmprune-gradients-")
        self._units, self._samples, self._kind = units, len(batches), kind
        self._kinds = ["mean", "squares", *({TURNED: ["turned"], FISHER: ["blocks"]}.get(kind, []))]
        self._layer_of = {
            spec.parameter: index
            for index, unit in enumerate(units)
            for spec in specs
            if spec.parameter.startswith(unit.prefix)
        }
        names = [[one.removeprefix(unit.prefix) for one in self.parameters(unit)] for unit in units]
        if kind == CURVATURE:
            for index, grams in output_grams(Trunk(model, units, batches, weights), names):
                self._save("curvature", index, grams)
        else:
            self._take(model, batches, weights, names)

    def _take(
        self, model: PreTrainedModel, batches: list[dict[str, Any]], weights: Loads, names: list[list[str]]
    ) -> None:
        units = self._units
        weight_squares = gradient_squares = 0.0
        take = PASSES.get(self._kind, loss_gradients)
        for index, found in take(Trunk(model, units, batches, weights), names):
            self._save("mean", index, {name: one.mean_OI for name, one in found.items()})
            self._save("squares", index, {name: one.squares_OI for name, one in found.items()})
            if self._kind == FISHER:
                self._save("blocks", index, {name: one.blocks_RNBB for name, one in found.items()})
            gradient_squares += sum(float(one.mean_OI.double().square().sum()) for one in found.values())
            held = (units[index].module.get_parameter(name).detach() for name in found)
            weight_squares += sum(float(one.double().square().sum()) for one in held)
        if self._kind == TURNED and gradient_squares > 0:
            step = STEP * math.sqrt(weight_squares / gradient_squares)
            ahead, behind = (Trunk(model, units, batches, _Moved(weights, self, way * step)) for way in (1, -1))
            for index, found in loss_gradients(ahead, names):
                self._save("ahead", index, {name: one.mean_OI for name, one in found.items()})
            for index, found in loss_gradients(behind, names):
                before = {name: self.read("ahead", units[index].prefix + name) for name in found}
                change = {name: before[name].to(one.mean_OI.device) - one.mean_OI for name, one in found.items()}
                self._save("turned", index, {name: one / (2 * step) for name, one in change.items()})

    def parameters(self, unit: Unit) -> list[str]:
        """The parameters of a layer of which there are gradients."""
        return [name for name in self._layer_of if name.startswith(unit.prefix)]

    def matrix(self, spec: MatrixSpec, weight_OI: torch.Tensor) -> Matrix:
        """A matrix with all that is known of it."""
        if self._kind != CURVATURE:
            return Matrix(spec.name, weight_OI, self.of(spec, weight_OI.device))
        with self._opened("curvature", spec.parameter) as file:
            # an expert that no token reached bends nothing
            known = spec.name in set(file.keys())
            found = file.get_tensor(spec.name) if known else torch.zeros(len(weight_OI), len(weight_OI))
        return Matrix(spec.name, weight_OI, curvature_OO=found.to(weight_OI.device))

    def of(self, spec: MatrixSpec, device: torch.device) -> Gradient:
        """The gradients of one matrix, outputs x inputs."""
        read = {kind: self.read(kind, spec.parameter, spec.index).to(device) for kind in self._kinds}
        blocks_RNBB = read.pop("blocks", None)
        mean_OI, squares_OI, *turned = (one.T if spec.transposed else one for one in read.values())
        found_OI = turned[0] if turned else None
        return Gradient(mean_OI, squares_OI, self._samples, found_OI, blocks_RNBB, by_columns=bool(spec.transposed))

    def read(self, kind: str, parameter: str, index: int | None = None) -> torch.Tensor:
        """One of the stored values of a parameter, or of a slice of it, as it is laid out."""
        with self._opened(kind, parameter) as file:
            found: torch.Tensor = file.get_tensor(parameter) if index is None else file.get_slice(parameter)[index]
        return found

    def _opened(self, kind: str, parameter: str) -> Any:
        return safe_open(self._path(kind, self._layer_of[parameter]), framework="pt")

    def _save(self, kind: str, layer: int, tensors: dict[str, Any]) -> None:
        prefix = self._units[layer].prefix
        save({prefix + name: one for name, one in tensors.items()}, self._path(kind, layer))

    def _path(self, kind: str, layer: int) -> Path:
        return Path(self._folder.name) / f"{kind}.{layer}.safetensors"


def with_gradients(gradients: Gradients | None, spec: MatrixSpec, weight_OI: torch.Tensor) -> Matrix:
    """A matrix as a method or score sees it; without gradients where there are none."""
    return Matrix(spec.name, weight_OI) if gradients is None else gradients.matrix(spec, weight_OI)


class _Moved:
    """Weights with a multiple of their gradient added while they are loaded."""

    def __init__(self, weights: Loads, gradients: Gradients, step: float) -> None:
        self._weights, self._gradients, self._step = weights, gradients, step
        self._before: dict[str, torch.Tensor] = {}

    def load(self, unit: Unit, *, dense: bool = False) -> None:
        self._weights.load(unit, dense=dense)
        for name in self._gradients.parameters(unit):
            parameter = unit.module.get_parameter(name.removeprefix(unit.prefix))
            self._before[name] = parameter.data
            mean = self._gradients.read("mean", name).to(parameter.device)
            parameter.data = parameter.data + self._step * mean.to(parameter.dtype)

    def fetch(self, parameters: Iterable[str]) -> None:
        self._weights.fetch(parameters)

    def free(self, unit: Unit) -> None:
        for name in self._gradients.parameters(unit):
            unit.module.get_parameter(name.removeprefix(unit.prefix)).data = self._before.pop(name)
        self._weights.free(unit)
