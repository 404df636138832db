"""Several processes that share a run, as `torchrun` would start them, but forked from the tests' own process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runner import Forked, Ran
from torch.distributed import TCPStore

from llmprune import ranks

STORES: list[TCPStore] = []


def start(count: int, *arguments: object, log: Path, before: Callable[[int], Any] = lambda rank: None) -> list[Forked]:
    """`llmprune ARGUMENTS` in `count` processes; `before(rank)` runs first in each."""
    # as with torchrun, what the processes leave for each other lies with neither of them
    store = TCPStore("127.0.0.1", 0, count, is_master=True, wait_for_workers=False)
    STORES.append(store)

    def prepare(rank: int) -> Callable[[], None]:
        def prepared() -> None:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE="True")
            ranks.current.cache_clear()
            before(rank)

        return prepared

    return [
        Forked(*arguments, log=log.with_name(f"{log.name}-{count}-{rank}"), before=prepare(rank))
        for rank in range(count)
    ]


def together(count: int, *arguments: object, log: Path) -> list[Ran]:
    """The same, to their end."""
    return [one.wait() for one in start(count, *arguments, log=log)]
