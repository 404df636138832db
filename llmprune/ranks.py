"""The processes of one run, as `torchrun` starts them: what they tell each other, and what happens when one ends.

Everything here does nothing, at no cost, in a process that is alone.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch

from llmprune.types import RunError, UserError

BEAT_S = 1.0
SILENCE_S = 40.0  # a process that shows no sign of life for this long is given up
# Waiting is bounded by the beats, not by the collectives: a rank may solve a large matrix for hours.
PATIENCE = datetime.timedelta(days=30)
LOST = "the connection to another process of this run is lost: it has ended"


class Ranks:
    """This process, number `rank` of `count`, and the ways to talk to the others; all must call alike."""

    def __init__(self, rank: int = 0, count: int = 1, store: Any = None) -> None:
        self.rank, self.count = rank, count
        self.speaks = True  # whether this process is the one that tells the user why the run ended
        self._store, self._runs = store, 0

    @property
    def leads(self) -> bool:
        """Whether this is the one process that writes and reports."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """What every rank says, in their order: any JSON value."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        with _linked():
            dist.all_gather(sizes, torch.tensor([len(text)]))
            longest = max(int(one) for one in sizes)
            parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.count)]
            dist.all_gather(parts, torch.cat([text, text.new_zeros(longest - len(text))]))
        return [json.loads(part[: int(size)].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]

    def tell(self, value: Any) -> Any:
        """What rank 0 says."""
        return self.gather(value if self.leads else None)[0]

    def sum_(self, tensor: torch.Tensor, to: int | None = None) -> None:
        """Sum a tensor over all ranks, in place; if `to` is given, only that rank gets the sum."""
        if self.count == 1:
            return
        import torch.distributed as dist

        with _linked():
            if to is None:
                dist.all_reduce(tensor)
            else:
                dist.reduce(tensor, to)

    def broadcast_(self, tensor: torch.Tensor, source: int) -> None:
        """Give every rank the tensor of one of them, in place."""
        if self.count == 1:
            return
        import torch.distributed as dist

        with _linked():
            dist.broadcast(tensor, source)

    def hand_over_(self, tensor: torch.Tensor, source: int, to: int) -> None:
        """Give rank `to` the tensor of rank `source`, in place; the others pass."""
        import torch.distributed as dist

        with _linked():
            if self.rank == source:
                dist.send(tensor, to)
            elif self.rank == to:
                dist.recv(tensor, source)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """While active, the end of one process ends all; without an error, all leave together."""
        if self.count == 1:
            yield
            return
        self._runs += 1
        watch = _Watch(self, self._store, f"run{self._runs}")
        watch.start()
        try:
            yield
            self.gather(None)
        except BaseException as error:
            self.speaks = watch.claim(2 if isinstance(error, UserError) else 1)
            raise
        finally:
            watch.stop()


class _Watch(threading.Thread):
    """Shows the others that this process lives, and ends it when one of them does not.

    A thread, since the main one may sit in a collective that will never complete.
    """

    def __init__(self, ranks: Ranks, store: Any, run: str) -> None:
        super().__init__(daemon=True)
        self._ranks, self._store, self._run = ranks, store.clone(), run
        self._over = threading.Event()
        self._others = [rank for rank in range(ranks.count) if rank != ranks.rank]
        self._store.set(f"{run}/who/{ranks.rank}", f"process {os.getpid()} on {socket.gethostname()}")
        self._beat(0)

    def claim(self, code: int) -> bool:
        """Announce the end of the run; whether this process is the first to do so, and so the one to say why."""
        try:
            first = bool(self._store.add(f"{self._run}/ends", 1) == 1)
            if first:
                self._store.set(f"{self._run}/end", str(code))
            return first
        except RuntimeError:
            return True

    def stop(self) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        # the monotonic clock: whoever sets the system's must not end a run
        seen = {rank: (b"", time.monotonic()) for rank in self._others}
        number = 0
        while not self._over.wait(BEAT_S):
            number += 1
            try:
                self._beat(number)
                if self._store.check([f"{self._run}/end"]):
                    os._exit(int(self._store.get(f"{self._run}/end")))
                beats = self._store.multi_get([f"{self._run}/beat/{rank}" for rank in self._others])
            except RuntimeError:
                self._end("the process that keeps the others in touch (torchrun, or rank 0) has ended")
            now = time.monotonic()
            for rank, beat in zip(self._others, beats, strict=True):
                if beat != seen[rank][0]:
                    seen[rank] = (beat, now)
                elif now - seen[rank][1] > SILENCE_S:
                    who = self._store.get(f"{self._run}/who/{rank}").decode()
                    self._end(f"rank {rank} ({who}) has shown no sign of life for {SILENCE_S:.0f} s")

    def _beat(self, number: int) -> None:
        self._store.set(f"{self._run}/beat/{self._ranks.rank}", str(number))

    def _end(self, why: str) -> None:
        if self._over.is_set():
            return
        if self.claim(1):
            hint = "what is finished is kept; run it again with --resume, on any number of processes"
            print(f"error: {why}\n{hint}", file=sys.stderr, flush=True)
        os._exit(1)


ALONE = Ranks()


def launched() -> bool:
    """Whether this process was started as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def leads() -> bool:
    """Whether this process is alone, or the first of several: the one that talks to the user."""
    return not launched() or os.environ["RANK"] == "0"


@functools.cache
def current() -> Ranks:
    """The processes of this run: those that `torchrun` started, or this one alone. Waits until all are there."""
    if not launched():
        return ALONE
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, count = next(iter(rendezvous("env://")))
    backend = "gloo"
    if torch.accelerator.is_available():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        torch.accelerator.set_device_index(local % torch.accelerator.device_count())
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        backend = f"cpu:gloo,{kind.type}:{dist.get_default_backend_for_device(kind)}"
    if not dist.is_initialized():
        dist.init_process_group(
            backend, store=PrefixStore("llmprune", store), rank=rank, world_size=count, timeout=PATIENCE
        )
        atexit.register(dist.destroy_process_group)
    return Ranks(rank, count, store)


@contextlib.contextmanager
def _linked() -> Iterator[None]:
    """Errors of a collective are those of a peer that has gone."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RunError(f"{LOST} ({str(error).splitlines()[0].partition('. ')[0]})") from error
