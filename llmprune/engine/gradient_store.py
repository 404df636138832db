"""Gradients of all matrices of a model, on disk until a matrix is scored.

They lie in the system's folder for temporary files (TMPDIR): two float32 values a weight, three with the Hessian's.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from llmprune.arch.discover import Unit
from llmprune.engine.gradients import loss_gradients, regional_gradients
from llmprune.engine.trunk import Trunk
from llmprune.statistics import REGIONAL, TURNED
from llmprune.types import Gradient, MatrixSpec
from llmprune.weights import Loads

# How far weights are moved along the gradient for a central difference, as a share of their norm. The error grows
# with its square, but the share that float32 loses with its inverse.
STEP = 1e-3


class Gradients:
    """What `types.Gradient` says of some matrices, all of it taken when this is made.

    `batches`: one sequence each. `kind`: of `statistics.OF_WEIGHTS`. `weights`: the dense ones.
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
        self._units, self._samples, self._turned = units, len(batches), kind == TURNED
        self._layer_of = {
            spec.parameter: index
            for index, unit in enumerate(units)
            for spec in specs
            if spec.parameter.startswith(unit.prefix)
        }
        names = [[one.removeprefix(unit.prefix) for one in self.parameters(unit)] for unit in units]
        weight_squares = gradient_squares = 0.0
        passes = regional_gradients if kind == REGIONAL else loss_gradients
        for index, found in passes(Trunk(model, units, batches, weights), names):
            self._save("mean", index, {name: one.mean_OI for name, one in found.items()})
            self._save("squares", index, {name: one.squares_OI for name, one in found.items()})
            gradient_squares += sum(float(one.mean_OI.double().square().sum()) for one in found.values())
            held = (units[index].module.get_parameter(name).detach() for name in found)
            weight_squares += sum(float(one.double().square().sum()) for one in held)
        if self._turned and gradient_squares > 0:
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

    def of(self, spec: MatrixSpec, device: torch.device) -> Gradient:
        """Those of one matrix, outputs x inputs."""
        kinds = ("mean", "squares", "turned") if self._turned else ("mean", "squares")
        read = (self.read(kind, spec.parameter, spec.index).to(device) for kind in kinds)
        mean, squares, *turned = (one.T if spec.transposed else one for one in read)
        return Gradient(mean, squares, self._samples, turned[0] if turned else None)

    def read(self, kind: str, parameter: str, index: int | None = None) -> torch.Tensor:
        """One of the stored values of a parameter, or of a slice of it, as it is laid out."""
        with safe_open(self._path(kind, self._layer_of[parameter]), framework="pt") as file:
            found: torch.Tensor = file.get_tensor(parameter) if index is None else file.get_slice(parameter)[index]
        return found

    def _save(self, kind: str, layer: int, tensors: dict[str, torch.Tensor]) -> None:
        prefix = self._units[layer].prefix
        save_file({prefix + name: one.contiguous() for name, one in tensors.items()}, self._path(kind, layer))

    def _path(self, kind: str, layer: int) -> Path:
        return Path(self._folder.name) / f"{kind}.{layer}.safetensors"


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
