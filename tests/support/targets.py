"""Everything that reads files which others wrote, as functions of their bytes: what is fuzzed.

A target may refuse its input with UserError or RunError; anything else that it raises is a fault.
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from llmprune.calibration import read_documents
from llmprune.checkpoint.output import JOURNAL_NAME, Output, _sealed
from llmprune.checkpoint.source import INDEX_NAME, SINGLE_NAME, Checkpoint
from llmprune.recipe import load_recipe, stages_of
from llmprune.types import RunError, UserError

RECIPE = b"""\
model: some/model
method: sparsegpt
options: {damping: 1e-2}
pattern: 2:4
targets: [q_proj, "re:.*mlp.*"]
overrides:
  - {targets: k_proj, sparsity: 0.3}
calibration: {source: demo, samples: 8, seqlen: 64}
engine: {schedule: layer, batch_size: 2}
seed: 3
"""
STAGES = b"calibration: {samples: 4}\nstages: [{drop_layers: 2}, {method: wanda, sparsity: 0.5}]\n"
HEADER = json.dumps(
    {
        "__metadata__": {"format": "pt"},
        "a.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
    }
).encode()
STORED = struct.pack("<Q", len(HEADER)) + HEADER + bytes(24)
INDEX = json.dumps({"metadata": {"total_size": 24}, "weight_map": {"a.weight": SINGLE_NAME, "b": SINGLE_NAME}}).encode()
PART = {"unit": "model.layers.0", "file": "model-00002-of-00003.safetensors", "bytes": 24, "sha256": "0" * 64}
JOURNAL = "".join(
    map(
        _sealed,
        ({"fingerprint": "f"}, {"unit": "rest", "file": None, "bytes": 0}, {**PART, "tensors": [], "fit": None}),
    )
).encode()
ROWS = b'{"text": "Once upon a time"}\n{"text": "there was", "n": 1}\n"a cat"\n'


class Target(NamedTuple):
    """`run(folder, data)`: `folder` is the target's own, and empty the first time."""

    seeds: tuple[bytes, ...]
    run: Callable[[Path, bytes], object]


def _recipe(folder: Path, data: bytes) -> None:
    (folder / "recipe.yaml").write_bytes(data)
    recipe = load_recipe(folder / "recipe.yaml", {})
    for stage in stages_of(recipe) or [recipe]:
        stage.budget()


def _header(folder: Path, data: bytes) -> None:
    (folder / SINGLE_NAME).write_bytes(data)
    checkpoint = Checkpoint(folder)
    for key in checkpoint.entries:
        checkpoint.tensor(key)


def _index(folder: Path, data: bytes) -> None:
    (folder / SINGLE_NAME).write_bytes(STORED)
    (folder / INDEX_NAME).write_bytes(data)
    checkpoint = Checkpoint(folder)
    assert all((folder / name).resolve().is_relative_to(folder.resolve()) for name in checkpoint.files)


def _journal(folder: Path, data: bytes) -> None:
    output = Output(folder / "out", "f")
    output.partial.mkdir(exist_ok=True)
    (output.partial / JOURNAL_NAME).write_bytes(data)
    with contextlib.closing(output):
        output.claim(resume=True)
        output.open()
    assert set(output.records) <= {"rest"}  # no other part lies there


def _text(name: str) -> Callable[[Path, bytes], None]:
    def run(folder: Path, data: bytes) -> None:
        (folder / name).write_bytes(data)
        assert all(isinstance(one, str) for one in read_documents(f"file:{folder / name}"))

    return run


TARGETS = {
    "recipe": Target((RECIPE, STAGES), _recipe),
    "safetensors header": Target((STORED,), _header),
    "safetensors index": Target((INDEX,), _index),
    "journal": Target((JOURNAL,), _journal),
    "jsonl": Target((ROWS,), _text("text.jsonl")),
    "json": Target((b'["Once", {"text": "upon"}]', b'[{"text": "a"}]'), _text("text.json")),
    "txt": Target((b"Once upon a time\n\n\xc3\xa9",), _text("text.txt")),
}
DOCUMENTED = (UserError, RunError)
