"""Recoveries in children: one that dies in the middle of its training, and one on several processes."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from runner import Forked, Ran


def dies_before_step(number: int) -> Callable[[], None]:
    """For `before` of a `Forked`: it is killed when step `number`, from 0, would begin."""

    def install() -> None:
        from llmprune.recovery.loop import Trainer

        step = Trainer._step

        def counted(self: Trainer, *given: Any) -> None:
            if self.state.done == number:
                os.kill(os.getpid(), signal.SIGKILL)
            step(self, *given)

        Trainer._step = counted  # type: ignore[method-assign]

    return install


def on_processes(count: int, *arguments: object, log: Path) -> list[Ran]:
    """How `llmprune ARGUMENTS` ends on each of `count` processes that find each other as torchrun's do."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def process(rank: int) -> Forked:
        def as_torchrun_does() -> None:
            AcceleratorState._reset_state(reset_partial_state=True)
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
            os.environ.update({"MASTER_ADDR": "localhost", **{key: str(value) for key, value in place.items()}})

        return Forked(*arguments, log=log.with_name(f"{log.name}-{rank}"), before=as_torchrun_does)

    return [one.wait() for one in [process(rank) for rank in range(count)]]
