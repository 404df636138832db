"""Runs of pruning tools, each in a fresh process of its own interpreter: environments, clocks, memory, load of the machine.

Nothing but the standard library at the top: workers import this in environments that hold only their tool.
Linux only: memory and the load of other jobs come from /proc.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WORKERS = Path(__file__).with_name("peer_workers.py")
Record = dict[str, Any]


# ---- inside a worker ----


def timed(call: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, float]:
    """The value of a call and the seconds that it took."""
    start = time.perf_counter()
    value = call(*args, **options)
    return value, time.perf_counter() - start


def memory(field: str) -> int:
    """This process's `VmHWM` (peak) or `VmRSS` (current) in bytes.

    Not `ru_maxrss`, which survives exec: a child would start with the peak of its parent.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def software(*names: str) -> Record:
    """Versions of Python and the named distributions (`checkout`: on the path only), and torch's threads."""
    import torch

    found = {"threads": torch.get_num_threads(), "python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "checkout"
    return found


# ---- around a worker ----


class WorkerFailed(RuntimeError):
    """A worker ended with an error; the message is the end of what it printed."""


def build_env(env: Path, pins: dict[str, str]) -> Path:
    """The interpreter of a peer's virtual environment, which is made and filled with `pins` in order if needed."""
    python = env / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", env], check=True)
    for name, pin in pins.items():
        probe = f"from importlib.metadata import version; print(version({name!r}))"
        found = subprocess.run([python, "-c", probe], check=False, capture_output=True, text=True)
        if found.stdout.strip().split("+")[0] != pin:
            print(f"installing {name}=={pin}", file=sys.stderr, flush=True)
            subprocess.run([python, "-m", "pip", "install", "--quiet", f"{name}=={pin}"], check=True)
    return python


def call(python: Path | str, worker: str, limit: float | None = None, *, on_gpu: bool = False, **job: Any) -> Record:
    """Run one of `peer_workers` in a fresh process of `python`, offline, for at most `limit` seconds.

    It sees no GPU unless `on_gpu`.
    """
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | (
        {} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""}
    )
    with tempfile.TemporaryDirectory() as scratch:
        result, log = Path(scratch) / "result.json", Path(scratch) / "log"
        command = [python, WORKERS, worker, json.dumps(job, default=str), result]
        with log.open("w") as output:
            env = os.environ | quiet
            try:
                process = subprocess.run(command, check=False, env=env, stdout=output, stderr=output, timeout=limit)
            except subprocess.TimeoutExpired:
                raise WorkerFailed(f"worker {worker!r} on {job}\nno end within {limit:.0f} s") from None
        if process.returncode:
            raise WorkerFailed(f"worker {worker!r} failed on {job}\n{log.read_text()[-4000:]}")
        record: Record = json.loads(result.read_text())
        return record


def machine_seconds() -> float:
    """CPU seconds that the machine has spent since it started on anything but our children."""
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    )
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return spent - children.ru_utime - children.ru_stime


def watched(python: Path | str, worker: str, limit: float | None = None, **job: Any) -> Record:
    """The record of one run, with the cores that other jobs kept busy on average meanwhile."""
    foreign = machine_seconds()
    record, wall = timed(call, python, worker, limit, **job)
    return record | {"other_cores": max(0.0, (machine_seconds() - foreign) / wall)}


def hardware() -> Record:
    """What the numbers depend on, without names of machines."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0))
    return {"cpu": cpu, "architecture": platform.machine(), "cores": cores, "gib": round(size / 2**30, 1)}
