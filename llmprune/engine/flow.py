"""Synaptic flow: what one input sends through every weight of a model whose weights are all taken as positive."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from llmprune.engine.gradients import Found, differentiated
from llmprune.engine.trunk import States, Trunk
from llmprune.types import Gradient, RunError

PRODUCTS = {"mul", "__mul__", "__rmul__", "matmul", "__matmul__", "bmm", "baddbmm"}
ACTIVATIONS = {"relu", "silu", "gelu", "tanh", "sigmoid"}
# of the flow that a layer may lose: rounding in float64 stays far below
LOST = 1e-8


def flow_gradients(trunk: Trunk, parameters: Sequence[Sequence[str]]) -> Iterator[tuple[int, Found]]:
    """dR/d|w| of the named parameters of every layer, from the last to the first; R is the sum of the last hidden state.

    The objective of SynFlow (Tanaka et al. 2020, arXiv:2006.05467, eq. 2): an input of ones, every weight at its absolute
    value, no biases. A transformer is made to pass on what it gets, so that |w| dR/d|w| over all weights that one
    hidden state goes through is R at every depth: activations are left out, norms and softmax become constant factors,
    and where two things that carry flow are multiplied (gate and up, query and key, probabilities and values) each
    counts half. One token, the batches of `trunk`; holds one layer, its weights and gradients in float64. Raises RunError for
    a layer that loses flow all the same. Yields while the layer is loaded.
    """
    with _eager(trunk):
        states = [torch.ones_like(one, dtype=torch.float64) for one in trunk.enter()]
        entered: list[States] = []
        for index, unit in enumerate(trunk.units):
            entered.append(states)
            with trunk.loaded(index), _flowing(unit.module):
                states = trunk.run(index, states)
        above = [torch.ones_like(one) for one in states]
        total = _sum(states, above)
        for index, unit in reversed(list(enumerate(trunk.units))):
            with trunk.loaded(index):
                with _flowing(unit.module):
                    found, above = _backwards(trunk, index, entered[index], above, parameters[index])
                if not abs(_sum(entered[index], above) - total) <= LOST * total:
                    raise RunError(f"synflow cannot follow the flow through {unit.name}; choose another score")
                yield index, found


def _backwards(trunk: Trunk, index: int, entered: States, above: States, names: Sequence[str]) -> tuple[Found, States]:
    parameters = {name: trunk.units[index].module.get_parameter(name) for name in names}
    found = {name: Gradient(torch.zeros_like(one), torch.zeros_like(one)) for name, one in parameters.items()}
    below: States = []
    with differentiated(list(parameters.values())), torch.enable_grad():
        for number, (state, cotangent) in enumerate(zip(entered, above, strict=True)):
            leaf = state.detach().requires_grad_()
            output = trunk.apply(index, number, leaf)
            into, *gradients = torch.autograd.grad(output, (leaf, *parameters.values()), cotangent, allow_unused=True)
            below.append(into)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    found[name].add(gradient, 1 / len(entered))
    return found, below


def _sum(states: States, weights: States) -> float:
    """Of the states, each value times its weight."""
    return sum(float((one * weight).sum()) for one, weight in zip(states, weights, strict=True))


class _Flow(TorchFunctionMode):
    """While active, operators hand on as much flow as they get."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ACTIVATIONS:
            return args[0]
        if name == "softmax":
            dim = kwargs["dim"] if kwargs and "dim" in kwargs else args[1]
            return args[0] / _positive_constant(args[0].sum(dim, keepdim=True))
        # masks and the like come in the model's own dtype
        args, kwargs = tree_map_only(torch.Tensor, _widened, (args, kwargs or {}))
        output = func(*args, **kwargs)
        given = (*args, *kwargs.values())
        if name in PRODUCTS and sum(map(_carries, given)) == 2:
            # the same value, and half of its gradient
            return 0.5 * output + 0.5 * output.detach()
        return output


def _widened(value: torch.Tensor) -> torch.Tensor:
    return value.double() if value.is_floating_point() else value


def _carries(value: Any) -> bool:
    """Whether flow passes a value: the weights, and views of them, only have a share in it."""
    if not isinstance(value, torch.Tensor) or not value.requires_grad:
        return False
    return not isinstance(value if value._base is None else value._base, nn.Parameter)


def _positive_constant(value: torch.Tensor) -> torch.Tensor:
    return value.detach().clamp_min(torch.finfo(value.dtype).tiny)


def _rescaled(hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return hidden / _positive_constant(hidden.square().mean(-1, keepdim=True).sqrt())


def _unchanged(hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return hidden


@contextlib.contextmanager
def _flowing(layer: nn.Module) -> Iterator[None]:
    """While active, a loaded layer has float64 matrices of absolute values and no biases, and passes on what it gets.

    Norms bring their input to a root mean square of 1, activation modules do nothing.
    """
    before = [(one, one.data) for one in layer.parameters()]
    for one, value in before:
        one.data = value.double().abs() if value.dim() > 1 else torch.zeros_like(value, dtype=torch.float64)
    changed: list[Any] = []
    for module in layer.modules():
        own = list(module.parameters(recurse=False))
        if not any(True for _ in (*module.children(), *module.buffers())) and all(one.dim() == 1 for one in own):
            vars(module)["forward"] = _rescaled if own else _unchanged
            changed.append(module)
    try:
        with _Flow():
            yield
    finally:
        for module in changed:
            del module.forward
        for one, value in before:
            one.data = value


@contextlib.contextmanager
def _eager(trunk: Trunk) -> Iterator[None]:
    """While active, attention is written out as products and a softmax."""
    before = trunk.model.config._attn_implementation
    trunk.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        trunk.model.set_attn_implementation(before)
