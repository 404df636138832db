"""Halves of layers that a model does without: as zeros in a plain checkpoint, or really left out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from llmprune.arch.discover import Unit
from llmprune.arch.sublayers import halves
from llmprune.checkpoint.modeling_pruned import leave_out
from llmprune.engine.search import run_without
from llmprune.engine.trunk import States, Trunk, holding
from llmprune.types import UserError


def zeros_for(units: list[Unit], silent: dict[int, tuple[str, ...]]) -> dict[str, torch.Tensor]:
    """Zeros for every parameter that the silent halves of layers write with, by name."""
    return {
        units[index].prefix + short: torch.zeros(units[index].module.get_parameter(short).shape)
        for index, parts in sorted(silent.items())
        for half in parts
        for short in halves(units[index].module)[half].parameters
    }


def modules_of(layer: nn.Module, half: str) -> list[str]:
    """The direct children of a layer that a half consists of; of one without a module of its own, what writes."""
    return list(dict.fromkeys(path.partition(".")[0] for path in halves(layer)[half].writers))


def entries_for(trunk: Trunk, silent: dict[int, tuple[str, ...]]) -> dict[int, dict[str, Any]]:
    """What `modeling_pruned` has to know to leave out halves of layers; raises UserError where a layer does not allow it.

    Runs each such layer a few times on one batch, one layer in memory: without the half it must give exactly what it
    gives when the half puts out zeros.
    """
    states = trunk.enter()[:1]
    found = {}
    for index, parts in sorted(silent.items()):
        with trunk.loaded(index):
            found[index] = _entry(trunk, index, parts, states)
    return found


def _entry(trunk: Trunk, index: int, parts: Iterable[str], states: States) -> dict[str, Any]:
    layer = trunk.units[index].module
    gone = [name for half in parts for name in modules_of(layer, half)]
    outputs: dict[str, dict[str, int]] = {}
    with contextlib.ExitStack() as stack:
        for name in gone:
            stack.callback(layer.get_submodule(name).register_forward_hook(_described(outputs, name)).remove)
        expected = run_without(trunk, index, states, {(index, half) for half in parts})[0]
    entry: dict[str, Any] = {"absent": outputs}
    with _without(layer, entry):
        try:
            same = torch.equal(trunk.apply(index, 0, states[0]), expected)
        except (RuntimeError, TypeError, AttributeError, IndexError):
            same = False
        if not same:
            raise UserError(
                f"{trunk.units[index].name} cannot do without its {' and '.join(parts)}: "
                f"{type(layer).__name__} does more there than add it; leave the layout plain"
            )
        unread = [name for name, module in _leaves(layer) if _is_unread(trunk, index, module, states[0], expected)]
    if unread:
        entry["unread"] = unread
    return entry


def _described(outputs: dict[str, dict[str, int]], name: str) -> Any:
    def describe(module: nn.Module, args: Any, output: Any) -> None:
        several = isinstance(output, tuple)
        first = output[0] if several else output
        outputs[name] = {"width": first.shape[-1], "items": len(output) if several else 0}

    return describe


@contextlib.contextmanager
def _without(layer: nn.Module, entry: dict[str, Any]) -> Iterator[None]:
    before = {name: layer.get_submodule(name) for name in entry["absent"]}
    leave_out(layer, entry)
    try:
        yield
    finally:
        for name, module in before.items():
            layer.set_submodule(name, module)


def _leaves(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in layer.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            yield name, module


def _is_unread(trunk: Trunk, index: int, module: nn.Module, state: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether a module's parameters could be anything: other values change nothing."""
    values = {name: 1 - 2 * one for name, one in module.named_parameters(recurse=False)}
    with holding(module, values):
        return torch.equal(trunk.apply(index, 0, state), expected)
