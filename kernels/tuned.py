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
    for entry in _read(name_of(device))[kernel]:
        if all(sizes[axis] <= bound for axis, bound in entry["up_to"].items()):
            launch: dict[str, int] = entry["launch"]
            return launch
    raise KeyError(f"no configuration of {kernel} holds {sizes}: its last entry must be unbounded")


@contextlib.contextmanager
def trial(kernel: str, launch: dict[str, int]) -> Iterator[None]:
    """While active, `kernel` is launched so, whatever the size: for tuning and tests."""
    _trials[kernel] = launch
    try:
        yield
    finally:
        del _trials[kernel]


def beats_torch(kernel: str, device: torch.device) -> bool:
    """Whether `kernel` was measured on this GPU and found to be faster than plain torch."""
    return kernel in _read(name_of(device))["beats_torch"]


@functools.cache
def name_of(device: torch.device) -> str:
    """The name of the file that this device looks for."""
    return _slug(torch.cuda.get_device_name(device)) if device.type == "cuda" else "default"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@functools.cache
def _read(name: str) -> dict[str, Any]:
    path = FOLDER / f"{name}.json"
    found: dict[str, Any] = json.loads((path if path.is_file() else FOLDER / "default.json").read_text())
    return found
