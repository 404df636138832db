"""What a depth or expert method is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
from transformers import PreTrainedModel

from llmprune.allocation.evolution import Evolution
from llmprune.arch.roles import Roles
from llmprune.arch.units import Units
from llmprune.checkpoint.slicing import Place
from llmprune.checkpoint.surgery import Surgery
from llmprune.engine.trunk import Trunk
from llmprune.types import UserError

TEXT = "text"
# The scores of units by place, and how many of each place go.
Spread: TypeAlias = Callable[[dict[Place, torch.Tensor]], dict[Place, int]]


@dataclass(frozen=True)
class Drop:
    """How many of `depth` layers go, and which, if the user says so himself."""

    depth: int
    count: int
    given: tuple[int, ...] | None = None

    @classmethod
    def of(cls, asked: int | list[int], depth: int) -> Drop:
        """Check what the user asked for against the model; raises UserError."""
        if isinstance(asked, int):
            if not 0 < asked < depth:
                raise UserError(f"drop_layers {asked}: the model has {depth} layers, so 1 to {depth - 1} can go")
            return cls(depth, asked)
        wrong = [one for one in asked if not 0 <= one < depth]
        if wrong or not asked:
            raise UserError(f"drop_layers {asked}: the layers are 0 to {depth - 1}")
        given = tuple(sorted(set(asked)))
        if len(given) == depth:
            raise UserError("drop_layers names every layer; at least one must stay")
        return cls(depth, len(given), given)

    def lowest(self, scores: dict[int, float]) -> tuple[int, ...]:
        """The layers with the lowest scores, ties to the lowest index."""
        return tuple(sorted(sorted(scores, key=lambda index: (scores[index], index))[: self.count]))

    def unprotected(self, first: int, last: int) -> range:
        """The layers that may go if some at the ends always stay; raises UserError if they are too few."""
        free = range(first, self.depth - last)
        if len(free) < self.count:
            raise UserError(
                f"{self.count} layers should go, but with protect_first={first} and protect_last={last} only "
                f"{len(free)} of {self.depth} may; drop fewer, or protect fewer"
            )
        return free

    def window(self, scores: dict[int, float]) -> tuple[int, ...]:
        """The given layers, which must follow each other, or the best window by the scores of its first layer."""
        if self.given is not None:
            if self.given != tuple(range(self.given[0], self.given[-1] + 1)):
                raise UserError(f"this method replaces layers that follow each other, not {list(self.given)}")
            return self.given
        start = min(scores, key=lambda index: (scores[index], index))
        return tuple(range(start, start + self.count))


@dataclass
class Decision:
    """The edit, the score of every layer or expert, and what a figure may show.

    `scores`: by layer, or by (layer, expert), or by (layer, part). `notes` go to the report as they are.
    """

    surgery: Surgery
    scores: dict[Any, float] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


class DepthMethod(Protocol):
    """A frozen dataclass whose fields are its recipe keys.

    `takes_list`: whether the user may name the layers. `memory` says what the method holds at once.
    """

    kind: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    patterns: ClassVar[tuple[str, ...]]
    output: ClassVar[str]
    paper: ClassVar[str]
    takes_list: ClassVar[bool]
    memory: ClassVar[str]

    def decide(self, trunk: Trunk, drop: Drop) -> Decision: ...


@dataclass(frozen=True)
class DropExperts:
    """How many of the `experts` of each of `layers` go: equally many in each of the router's `groups`."""

    depth: int
    layers: tuple[int, ...]
    experts: int
    count: int
    groups: int

    def lowest(self, scores: dict[int, float]) -> tuple[int, ...]:
        """The experts that stay when those with the lowest scores go, ties to the lowest index."""
        size, gone = self.experts // self.groups, self.count // self.groups
        kept: list[int] = []
        for start in range(0, self.experts, size):
            group = range(start, start + size)
            kept += sorted(sorted(group, key=lambda index: (scores[index], index))[gone:])
        return tuple(kept)


class ExpertMethod(DepthMethod, Protocol):
    """The same for experts."""

    def decide(self, trunk: Trunk, drop: DropExperts) -> Decision: ...  # type: ignore[override]


@dataclass(frozen=True)
class Narrow:
    """What a width method is asked: the units of the model, and how many of each place go, which `spread` answers.

    `spread` gives the number of units that go, from the scores of all units where `scored` says that it needs them; with
    `influence` these are scores of layers (see `allocation.widths`).
    `check_biases` raises UserError if the class cannot be given biases of these names. `search`: how the amounts are to
    be searched for, from those that `spread` gives; None if they are not.
    """

    roles: Roles
    units: dict[Place, Units]
    spread: Spread
    scored: bool
    check_biases: Callable[[list[str]], None]
    search: Evolution | None = None
    influence: bool = False


@dataclass
class Narrowed:
    """What a width method answers: the units that go, new values (full size) of parameters, biases that are new.

    `scores`: of every unit, the lowest go first; `notes` go to the report as they are.
    """

    removed: dict[Place, list[int]]
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    biases: dict[str, torch.Tensor] = field(default_factory=dict)
    scores: dict[Place, torch.Tensor] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


class WidthMethod(DepthMethod, Protocol):
    """The same for units of width. `check` raises UserError for a model that the method cannot handle."""

    def check(self, model: PreTrainedModel, asked: Narrow) -> None: ...

    def decide(self, trunk: Trunk, asked: Narrow) -> Narrowed: ...  # type: ignore[override]
