"""How benchmark results are recorded: what was run, on what, and when, beside every figure."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks"
SHARED = ROOT.parent / "shared"


def environment(*packages: str) -> dict[str, Any]:
    """Date, hardware, versions and command of this run."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    names = ("llmprune", "torch", "transformers", *packages)
    command = " ".join([Path(sys.argv[0]).resolve().relative_to(ROOT).as_posix(), *sys.argv[1:]])
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used, {_gpu()}",
        "versions": {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}},
        "command": f"python {command}",
    }


def _gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def load(name: str) -> dict[str, Any]:
    """What `benchmarks/NAME.json` holds; nothing if it is not there."""
    path = FOLDER / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def enter(saved: dict[str, Any], *packages: str) -> None:
    """Enter the environment of this run into a record that is made in several, with the commands of all."""
    saved["environment"] = environment(*packages)
    saved["commands"] = list(dict.fromkeys([*saved.get("commands", []), saved["environment"]["command"]]))
    saved["environment"]["command"] = "; ".join(saved["commands"])


def save(name: str, record: dict[str, Any], markdown: str, echo: bool = True) -> None:
    """Write `benchmarks/NAME.json` and `benchmarks/NAME.md`."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    where = record["environment"]
    versions = ", ".join(f"{key} {value}" for key, value in where["versions"].items())
    head = f"{where['date']}; {where['hardware']}; {versions}. Made by `{where['command']}`.\n\n"
    (FOLDER / f"{name}.md").write_text(head + markdown)
    if echo:
        print(markdown)


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(one) + " |" for one in (heads, ["---"] * len(heads), *rows)]
    return "\n".join(lines) + "\n"
