"""Peak memory of this process, measured while it runs."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import resource
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llmprune.types import RunError

_STATUS = Path("/proc/self/status")
_MEMORY = Path("/proc/meminfo")


class PeakMemory:
    """Samples the resident memory in the background.

    `anonymous` is what the process itself allocated; `resident` counts mapped checkpoint pages
    too, which the system may drop at any time. Both in bytes.
    """

    def __init__(self, interval_s: float = 0.05) -> None:
        self.anonymous = 0
        self.resident = 0
        self._interval = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self._sample()

    def _sample(self) -> None:
        anonymous, resident = current()
        self.anonymous = max(self.anonymous, anonymous)
        self.resident = max(self.resident, resident)


@contextlib.contextmanager
def within_memory() -> Iterator[None]:
    """Say what helps where a device runs out of memory: RunError instead of torch's own error."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        first = str(error).partition(". ")[0]
        raise RunError(
            f"out of memory ({first}); give a smaller --batch-size, fewer --samples, or more processes"
        ) from error


def current() -> tuple[int, int]:
    """Anonymous and whole resident memory now, in bytes. Without /proc both are the peak resident size."""
    if _STATUS.exists():
        fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
        return tuple(int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "VmRSS"))  # type: ignore[return-value]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak


def unused(device: torch.device) -> int:
    """Memory of a device that can still be taken, in bytes; on CPU without swapping, or half of all without /proc."""
    if device.type != "cpu":
        return int(torch.accelerator.get_memory_info(device)[0])
    if not _MEMORY.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    fields = dict(line.split(":", 1) for line in _MEMORY.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def within_reach(device: torch.device) -> int:
    """Memory of a device that a run can have, in bytes: what is unused there, and what this process holds already."""
    held = current()[0] if device.type == "cpu" else torch.accelerator.memory_reserved(device)
    return unused(device) + held


def give_back() -> None:
    """Return freed blocks to the system, where the allocator would keep them (glibc).

    Freed matrices below 32 MiB otherwise stay in a heap that fragments and grows from layer to layer.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


class Meter:
    """How much memory of a device is in use, and the most since the last reset, in bytes.

    On the CPU that is what this process allocated (see `PeakMemory.anonymous`), sampled every 2 ms; on an accelerator,
    what torch handed out.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._watch: PeakMemory | None = None

    def reset(self) -> None:
        """Forget the peak so far."""
        if self._device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(self._device)
            return
        self.close()
        give_back()
        self._watch = PeakMemory(interval_s=0.002)
        self._watch.__enter__()

    def now(self) -> int:
        return current()[0] if self._device.type == "cpu" else torch.accelerator.memory_allocated(self._device)

    def peak(self) -> int:
        if self._device.type != "cpu":
            return torch.accelerator.max_memory_allocated(self._device)
        assert self._watch is not None
        self._watch._sample()
        return self._watch.anonymous

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)

    def close(self) -> None:
        if self._watch is not None:
            self._watch.__exit__()
            self._watch = None
