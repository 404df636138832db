"""Suspend the model's own forward at chosen points, for all calibration batches at once.

Each batch runs `model(**batch)` in a coroutine of its own. Where the engine wants to work, the
forward switches back to it with whatever it holds there; everything that the model computed
(masks, rotary tables, state shared across layers) stays alive in the suspended frames. So no
layer loop is copied from any model, and none breaks with a release of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import greenlet
import torch

from llmprune.types import RunError

# Arguments of a module, as its forward hook saw them.
Call = tuple[tuple[Any, ...], dict[str, Any]]
# The calls of a layer, one a batch, each with what it now puts out.
Calls = list[tuple[Call, torch.Tensor]]


@dataclass(frozen=True)
class Stop:
    """A place where a forward is suspended: what kind of place, its name, and what it holds there."""

    kind: str
    name: str
    payload: Any = None

    @property
    def place(self) -> tuple[str, str]:
        return (self.kind, self.name)


def first_tensor(output: Any) -> torch.Tensor:
    """The hidden states that a decoder layer returns, alone or at the head of a tuple."""
    tensor: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return tensor


DONE = Stop("done", "")


class Suspended:
    """A set of forwards, one a batch, that advance together from stop to stop."""

    def __init__(self, forward: Callable[[Any], object], batches: list[Any]) -> None:
        self._engine = greenlet.getcurrent()
        self._batches = batches
        self._jobs = [greenlet.greenlet(self._run) for _ in batches]
        self._forward = forward
        self.stops: list[Stop] = []

    def _run(self, batch: Any) -> Stop:
        self._forward(batch)
        return DONE

    def inside(self) -> bool:
        """Whether the caller runs inside one of the suspended forwards, not in the engine."""
        return greenlet.getcurrent() is not self._engine

    def pause(self, stop: Stop) -> bool:
        """Called from inside a forward: give control to the engine until it goes on; whether to do this part again."""
        again: bool = self._engine.switch(stop)
        return again

    def start(self) -> None:
        """Run every batch to its first stop."""
        self.stops = [job.switch(batch) for job, batch in zip(self._jobs, self._batches, strict=True)]

    def advance(self, *, again: bool = False) -> None:
        """Run every batch from where it stands to its next stop; `again`: from an exit, through its unit anew."""
        for _ in self.advance_each(again=again):
            pass

    def advance_each(self, *, again: bool = False) -> Iterator[int]:
        """`advance`, yielding the number of each batch just before it moves."""
        for number, job in enumerate(self._jobs):
            yield number
            # one at a time, so that what a batch held at its old stop is freed before the next one moves
            self.stops[number] = DONE
            self.stops[number] = job.switch(again)

    def place(self) -> Stop:
        """Where the batches stand. They must agree: a model whose order depends on the data cannot be suspended."""
        first = self.stops[0]
        for number, stop in enumerate(self.stops):
            if stop.place != first.place:
                raise RunError(
                    f"batch 0 stands at {first.kind} {first.name!r} and batch {number} at {stop.kind} "
                    f"{stop.name!r}: the order of this model depends on the data; try --schedule layer"
                )
        return first

    def close(self) -> None:
        """End every forward where it stands."""
        for job in self._jobs:
            if job and not job.dead:
                job.throw(greenlet.GreenletExit)

    def __enter__(self) -> Suspended:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def payloads(self) -> Iterator[Any]:
        """What each batch holds at its stop, in batch order."""
        return (stop.payload for stop in self.stops)
