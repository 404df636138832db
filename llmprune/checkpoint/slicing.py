"""Units taken out of a model: the one routine that cuts tensors, and the arithmetic of what is left."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

from llmprune.arch.units import RESIDUAL, Member, Units
from llmprune.types import UserError

# The layer (None: the whole model) and the kind of some units.
Place: TypeAlias = tuple[int | None, str]
HIDDEN: Place = (None, RESIDUAL)


@dataclass
class _Axis:
    """What happens along an axis of a parameter: slices that become `zero`, and those of them that are `gone`.

    Both are masks of the axis; where every expert has its own, one mask an expert. `norm`: this is the gain of a norm
    whose mean runs over the axis; `loud`: the quiet entries go (the hidden state), not some as loud as the others.
    """

    zero: torch.Tensor
    gone: torch.Tensor
    norm: bool
    loud: bool

    def gain(self, *, cut: bool) -> float:
        """By what a norm's gain is multiplied, its mean now being over fewer entries, or over more zeros."""
        every = self.zero.numel()
        wanted = every if self.loud else every - int(self.zero.sum())
        present = every - int(self.gone.sum()) if cut else every
        return math.sqrt(wanted / present) if self.norm else 1.0


class Slicing:
    """What removing some units does to every parameter of a model whose parameters have `shapes`.

    `removed`: the numbers of the units that go, by layer and kind. One width must fit all layers: where a layer loses
    more units of a kind than another does, the surplus stays as zeros, and so do all of the kinds `held`. With `ragged`
    every layer gets its own width. Raises UserError if strata would keep different numbers.
    """

    def __init__(
        self,
        units: Iterable[Units],
        shapes: Mapping[str, torch.Size],
        removed: Mapping[Place, Iterable[int]],
        *,
        held: Iterable[str] = (),
        ragged: bool = False,
    ) -> None:
        self.units: dict[Place, Units] = {(one.layer, one.kind): one for one in units}
        self.removed = {place: tuple(sorted(set(removed.get(place, ())))) for place in self.units}
        for place, one in self.units.items():
            _check_strata(one, self.removed[place])
        self.spare = self._spare(frozenset(held), ragged)
        self._shapes = dict(shapes)
        self._axes: dict[str, dict[int, _Axis]] = {}
        for place, one in self.units.items():
            for member in one.members:
                self._mark(one, member, self.removed[place], self.spare[place])

    @property
    def parameters_removed(self) -> int:
        """How many parameters the model has less; those that stay as zeros do not count."""
        return sum(math.prod(shape) - math.prod(self._shape(name)) for name, shape in self._shapes.items())

    @property
    def parameters_zeroed(self) -> int:
        """How many parameters stay as zeros, so that one width fits all layers."""
        return sum(math.prod(self._shape(name)) - self._filled(name) for name in self._axes)

    def width(self, place: Place) -> int:
        """Units of a kind that a layer has in the result, zeros included."""
        return self.units[place].count - len(self.removed[place]) + len(self.spare[place])

    def kept(self, place: Place) -> list[int]:
        gone = set(self.removed[place])
        return [unit for unit in range(self.units[place].count) if unit not in gone]

    def kept_along(self, parameter: str, axis: int) -> list[int]:
        """The entries along an axis of a parameter that are there in the result."""
        one = self._axes.get(parameter, {}).get(axis)
        everything = torch.arange(self._shapes[parameter][axis])
        return (everything if one is None else everything[~one.gone]).tolist()

    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every parameter in the result."""
        return {name: self._shape(name) for name in self._shapes}

    def cut(self, parameter: str, tensor: torch.Tensor) -> torch.Tensor:
        """What is left of a parameter, in its dtype."""
        tensor = self._with_zeros(parameter, tensor, cut=True)
        for axis, one in self._axes.get(parameter, {}).items():
            tensor = _select(tensor, axis, ~one.gone)
        return tensor.contiguous()

    def zeroed(self, parameter: str, tensor: torch.Tensor) -> torch.Tensor:
        """The parameter at its full size, zeros for what is removed: with these the old model computes the same."""
        return self._with_zeros(parameter, tensor, cut=False)

    def _with_zeros(self, parameter: str, tensor: torch.Tensor, *, cut: bool) -> torch.Tensor:
        for axis, one in self._axes.get(parameter, {}).items():
            around = [1] * (tensor.dim() - one.zero.dim() - (axis - one.zero.dim() + 1))
            before = [1] * (axis - one.zero.dim() + 1)
            # experts first, then the axes between, then the axis itself
            mask = one.zero.to(tensor.device).view(*one.zero.shape[:-1], *before, -1, *around)
            tensor = tensor.masked_fill(mask, 0)
            if one.gain(cut=cut) != 1:
                tensor = (tensor.float() * one.gain(cut=cut)).to(tensor.dtype)
        return tensor

    def _shape(self, parameter: str) -> torch.Size:
        sizes = list(self._shapes[parameter])
        for axis, one in self._axes.get(parameter, {}).items():
            sizes[axis] -= int(one.gone.sum()) // (len(one.gone) if one.gone.dim() == 2 else 1)
        return torch.Size(sizes)

    def _filled(self, parameter: str) -> int:
        """How many entries of a parameter do not belong to any removed unit."""
        shape, axes = self._shapes[parameter], self._axes[parameter]
        others = math.prod(size for axis, size in enumerate(shape) if axis not in axes)
        left = torch.tensor(others)
        for one in axes.values():
            left = left * (~one.zero).sum(-1)
        # with a mask an expert there are as many numbers, whose axis is among the others
        return int(left.sum()) // (len(left) if left.dim() else 1)

    def _spare(self, held: frozenset[str], ragged: bool) -> dict[Place, tuple[int, ...]]:
        """Removed units that stay as zeros: of each stratum those with the lowest numbers."""
        least: dict[str, int] = {}
        for place, one in self.units.items():
            each = 0 if place[1] in held else len(self.removed[place]) // one.strata
            least[place[1]] = min(each, least.get(place[1], each))
        found = {}
        for place, one in self.units.items():
            gone, each = self.removed[place], len(self.removed[place]) // one.strata
            surplus = 0 if ragged and place[1] not in held else each - least[place[1]]
            found[place] = tuple(unit for run in range(one.strata) for unit in gone[run * each : run * each + surplus])
        return found

    def _mark(self, units: Units, member: Member, removed: tuple[int, ...], spare: tuple[int, ...]) -> None:
        axes = self._axes.setdefault(member.parameter, {})
        if member.axis not in axes:
            size = self._shapes[member.parameter][member.axis]
            none = torch.zeros((units.strata, size) if units.stacked else (size,), dtype=torch.bool)
            axes[member.axis] = _Axis(none, none.clone(), member.norm, units.kind == RESIDUAL)
        axis = axes[member.axis]
        for mask, chosen in ((axis.zero, removed), (axis.gone, sorted(set(removed) - set(spare)))):
            unit_U = torch.tensor(chosen, dtype=torch.int64)
            index_UN = member.index_UN[unit_U]
            if units.stacked:
                mask[(unit_U // units.size)[:, None], index_UN] = True
            else:
                mask[index_UN] = True


def _check_strata(units: Units, removed: tuple[int, ...]) -> None:
    counts = {sum(unit // units.size == run for unit in removed) for run in range(units.strata)}
    if len(counts) > 1:
        raise UserError(
            f"layer {units.layer} would lose between {min(counts)} and {max(counts)} of each {units.size} "
            f"{units.kind}s; every group of them must lose as many"
        )
    if removed and len(removed) == units.count:
        raise UserError(f"layer {units.layer} would lose all of its {units.count} {units.kind}s; one must stay")


def _select(tensor: torch.Tensor, axis: int, keep: torch.Tensor) -> torch.Tensor:
    keep = keep.to(tensor.device)
    if keep.dim() == 1:
        return tensor if bool(keep.all()) else tensor.index_select(axis, keep.nonzero().flatten())
    return torch.stack([_select(one, axis - 1, mask) for one, mask in zip(tensor, keep, strict=True)])
