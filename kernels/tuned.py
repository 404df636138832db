"""Launch configurations of the Triton kernels, read from JSON: one file a GPU, chosen by the shape's bucket.

`configurations/NAME.json`, NAME being torch's name of the GPU in lower case with hyphens; a GPU without a file
gets `default.json`. Nothing is tuned at import or at a call. How to add a file: README.md in this folder.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "configurations"


_trials: dict[str, dict[str, int]] = {}


def configuration(kernel: str, device: torch.device, **sizes: int) -> dict[str, int]:
    """The launch parameters of `kernel` for these sizes: of the first entry whose upper bounds hold them all."""
    if kernel in _trials:
        return _trials[kernel]
    launch: dict[str, int] = _entry(kernel, device, sizes)["launch"]
    return launch


@contextlib.contextmanager
def trial(kernel: str, launch: dict[str, int]) -> Iterator[None]:
    """While active, `kernel` is launched so, whatever the size: for tuning and tests."""
    _trials[kernel] = launch
    try:
        yield
    finally:
        del _trials[kernel]


def is_faster(kernel: str, device: torch.device, **sizes: int) -> bool:
    """Whether `kernel` was measured on this GPU at about these sizes, and faster than what would run otherwise."""
    return bool(_entry(kernel, device, sizes).get("faster", False))


def _entry(kernel: str, device: torch.device, sizes: dict[str, int]) -> dict[str, Any]:
    for entry in _read(device)[kernel]:
        if all(sizes[axis] <= bound for axis, bound in entry["up_to"].items()):
            found: dict[str, Any] = entry
            return found
    raise KeyError(f"no configuration of {kernel} holds {sizes}: its last entry must be unbounded")


@functools.cache
def name_of(device: torch.device) -> str:
    """The name of the file that this device looks for."""
    return _slug(torch.cuda.get_device_name(device)) if device.type == "cuda" else "default"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def path_of(device: torch.device) -> Path:
    """The file that holds what was measured on such a device, if there is one."""
    return FOLDER / f"{name_of(device)}.json"


@functools.cache
def _read(device: torch.device) -> dict[str, Any]:
    path = path_of(device)
    found: dict[str, Any] = json.loads((path if path.is_file() else FOLDER / "default.json").read_text())
    return found
