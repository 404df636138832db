"""The zeros of a pruned model: found before anything is trained, and still there afterwards."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from llmprune.arch.discover import Unit, find_units
from llmprune.arch.sublayers import attends
from llmprune.types import MatrixSpec, UserError

# A matrix with a larger share of zeros was pruned; a dense one holds a few by chance.
PRUNED = 0.01
ROLES = ("all-linear", "attention", "mlp")


@dataclass(frozen=True)
class Target:
    """A parameter that holds matrices of the decoder layers or the head, and which of its weights are kept.

    `place`: path of its module in its layer, None for the head. `kept`: bool, in the layout of the parameter.
    """

    name: str
    place: str | None
    owner: nn.Module
    short: str
    specs: tuple[MatrixSpec, ...]
    kept: torch.Tensor

    @property
    def pruned(self) -> bool:
        return float((~self.kept).sum()) > PRUNED * self.kept.numel()


def find_targets(model: PreTrainedModel) -> list[Target]:
    """Every parameter that holds matrices, with its zeros as they are now. A tied head counts as the embedding."""
    tied = model.get_output_embeddings() is None or (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )
    units: list[Unit] = find_units(model, head=not tied)
    found = []
    for unit in units:
        for name, specs in itertools.groupby(unit.matrices, lambda spec: spec.parameter):
            owner, _, short = name.rpartition(".")
            place = None if owner == unit.name else owner.removeprefix(unit.prefix)
            kept = model.get_parameter(name).detach() != 0
            found.append(Target(name, place, model.get_submodule(owner), short, tuple(specs), kept))
    return found


def chosen(targets: list[Target], role: str) -> list[Target]:
    """The matrices that play `role` in their layer; the head plays none. Raises UserError."""
    if role not in ROLES:
        raise UserError(f"targets={role!r} must be one of {', '.join(ROLES)}")
    layered = [one for one in targets if one.place is not None]
    if role == "all-linear":
        return layered
    found = [one for one in layered if attends(one.place or "") == (role == "attention")]
    if not found:
        raise UserError(f"targets={role!r}: no matrix of the layers is told to be one; use all-linear")
    return found


def attach(targets: list[Target], make: Callable[[Target], nn.Module]) -> Iterator[tuple[Target, nn.Module]]:
    """Compute each target's weight from the stored one by a module; yields them.

    The stored weight is then the parameter `original`, and autograd sees what the module makes of it.
    """
    for target in targets:
        module = make(target)
        parametrize.register_parametrization(target.owner, target.short, module, unsafe=True)
        yield target, module


def detach(targets: list[Target]) -> None:
    """Make the computed weights plain parameters again, in float32."""
    for target in targets:
        owner: nn.Module = target.owner
        with torch.no_grad():
            value = getattr(owner, target.short).detach()
        parametrize.remove_parametrizations(owner, target.short, leave_parametrized=False)
        owner.register_parameter(target.short, nn.Parameter(value, requires_grad=False))


class Keep(nn.Module):
    """The weight with its zeros: they get no gradient, so that no optimizer moves them."""

    kept: torch.Tensor

    def __init__(self, kept: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", kept, persistent=False)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.masked_fill(~self.kept, 0)


@torch.no_grad()
def put_back(model: PreTrainedModel, targets: list[Target]) -> None:
    """Set to zero what was zero when `targets` were found."""
    for target in targets:
        model.get_parameter(target.name).masked_fill_(~target.kept, 0)


def count_zeros(model: PreTrainedModel, targets: list[Target]) -> dict[str, tuple[tuple[int, int], int]]:
    """Shape (outputs, inputs) and zeros of every matrix of the decoder layers."""
    found = {}
    for target in targets:
        value = model.get_parameter(target.name)
        for spec in target.specs if target.place is not None else ():
            own = value if spec.index is None else value[spec.index]
            found[spec.name] = (spec.outputs, spec.inputs), int((own == 0).sum())
    return found
