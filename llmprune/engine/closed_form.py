"""Fit what a decoder layer writes with to the dense layer's output, in closed form: no gradient, no optimizer."""

from __future__ import annotations

import torch

from llmprune.arch.discover import Unit, expert_blocks
from llmprune.arch.sublayers import HALVES, MLP, halves
from llmprune.engine.fold import output_axis
from llmprune.engine.observe import Observe, Product
from llmprune.engine.reconstruct import output_of, squared
from llmprune.engine.rescale import rescale
from llmprune.engine.suspend import Calls
from llmprune.kernels.gram import cross_update_, gram_update_
from llmprune.linalg import scaled
from llmprune.solvers.least_squares import least_squares
from llmprune.solvers.retarget import retarget

# of the unit-diagonal Gram matrix: how strongly weights are held to what they are
DAMPING = 0.01
# of what a vector makes out: by how much outputs may differ from a straight line, in half precision
AFFINE = 1e-2

Values = dict[str, torch.Tensor]


def fit_layer(
    unit: Unit, storage: dict[str, torch.dtype], calls: Calls, targets: list[torch.Tensor]
) -> tuple[float, float]:
    """Fit, in place, what a loaded layer writes to the residual stream; its error before and after.

    First the matrix of the attention, then that of the MLP, each on the inputs that it then gets (`refit_writer`); what
    experts write gets scales and biases instead (`rescale`). Then the gains of norms that come last (`refit_gain`). New values are
    kept only if they lower the error of the layer, which is relative to the energy of the targets. `storage`: dtypes in
    which parameters will be stored; `calls`: arguments and present output of each batch.
    """
    layer = _Layer(unit, calls, targets)
    before = layer.error
    experts = {path for path, _ in expert_blocks(unit.module)}
    for half in HALVES:
        writers = halves(unit.module)[half].writers
        if experts.isdisjoint(writers):
            for path in writers:
                layer.offer(refit_writer(unit, path, storage, layer.calls, targets))
        elif half == MLP:
            layer.offer(rescale(unit, storage, layer.calls, targets)[0])
    for name, parameter in unit.module.named_parameters():
        if name.endswith("weight") and parameter.shape == targets[0].shape[-1:]:
            layer.offer(refit_gain(unit, name, storage, layer.calls, targets))
    energy = sum(float(one.float().square().sum()) for one in targets)
    return before / energy, layer.error / energy


class _Layer:
    """A layer with its calls, their present outputs, and the squared distance of those from their targets."""

    def __init__(self, unit: Unit, calls: Calls, targets: list[torch.Tensor]) -> None:
        self._unit, self._targets, self.calls = unit, targets, calls
        self.error = self._measured(calls)

    def offer(self, values: Values) -> None:
        """Take these values over, by name in the layer, if the error is lower with them."""
        module = self._unit.module
        calls = [(call, output_of(module, values, call)) for call, _ in self.calls] if values else self.calls
        error = self._measured(calls)
        if error < self.error:
            self.calls, self.error = calls, error
            for name, value in values.items():
                module.get_parameter(name).copy_(value)

    def _measured(self, calls: Calls) -> float:
        return sum(float(squared(now, target)) for (_, now), target in zip(calls, self._targets, strict=True))


def refit_writer(
    unit: Unit, path: str, storage: dict[str, torch.dtype], calls: Calls, targets: list[torch.Tensor]
) -> Values:
    """New values for the weight and the bias of the module at `path`, by name in the layer and as they will be read back.

    Weights V on the mask of W, and b where there is a bias, that minimise |output + X (V - W)' + b - target|^2 over all
    tokens X that the matrix sees, with a little damping towards W. That is the layer's own error if what the module puts out
    is simply added to the layer's output: an MLP that follows, and a norm, are passed over.
    """
    weight, bias = f"{path}.weight", f"{path}.bias"
    stored = {name: unit.module.get_parameter(name) for name in (weight, bias) if name in storage}
    turned = output_axis(unit, weight, targets[0].shape[-1]) == -1
    matrix_OI = (stored[weight].T if turned else stored[weight]).detach().float()
    columns = [matrix_OI, stored[bias].detach().float()[:, None]] if bias in stored else [matrix_OI]
    whole_OJ = torch.cat(columns, 1)
    gram_JJ, pull_OJ = whole_OJ.new_zeros(whole_OJ.shape[1], whole_OJ.shape[1]), torch.zeros_like(whole_OJ)
    seen: list[torch.Tensor] = []

    def see(products: list[Product]) -> None:
        seen.extend(one.x_TI for one in products)

    for (call, now), target in zip(calls, targets, strict=True):
        with Observe({weight: stored[weight]}, see):
            output_of(unit.module, {}, call)
        x_TI, lack_TO = seen.pop().float(), (target.float() - now.float()).flatten(0, -2)
        x_TJ = torch.cat([x_TI, x_TI.new_ones(len(x_TI), 1)], 1) if bias in stored else x_TI
        gram_update_(gram_JJ, x_TJ)
        cross_update_(pull_OJ, lack_TO, x_TJ)
    system = scaled(gram_JJ, DAMPING)
    kept_OJ = whole_OJ != 0
    kept_OJ[:, matrix_OI.shape[1] :] = True
    aim_OJ = retarget(whole_OJ, pull_OJ, system, 1.0)
    found_OJ = least_squares(aim_OJ, ~kept_OJ, system, start_OI=whole_OJ)
    matrix_OI = found_OJ[:, : matrix_OI.shape[1]]
    values = {weight: matrix_OI.T if turned else matrix_OI}
    if bias in stored:
        values[bias] = found_OJ[:, -1]
    return {name: value.to(storage[name]).float().contiguous() for name, value in values.items()}


def refit_gain(
    unit: Unit, name: str, storage: dict[str, torch.dtype], calls: Calls, targets: list[torch.Tensor]
) -> Values:
    """New values for a vector g if output channel i is a + b g_i, as it is for the gain of a norm that comes last.

    For each channel the g that minimises |a + b g - target|^2 over all tokens; no values for other vectors.
    """
    module, g_D = unit.module, unit.module.get_parameter(name).detach().float()
    sums_SD = torch.zeros(2, len(g_D), dtype=torch.float64, device=g_D.device)
    for (call, now), target in zip(calls, targets, strict=True):
        base, whole = (output_of(module, {name: torch.full_like(g_D, one)}, call).float() for one in (0.0, 1.0))
        slope = whole - base
        if (base + slope * g_D - now.float()).norm() > AFFINE * (now.float() - base).norm():
            return {}
        parts = (slope * (target.float() - base), slope.square())
        sums_SD += torch.stack([one.double().flatten(0, -2).sum(0) for one in parts])
    found_D = torch.where(sums_SD[1] > 0, sums_SD[0] / sums_SD[1], g_D)
    return {name: found_D.to(storage[name]).float()}
