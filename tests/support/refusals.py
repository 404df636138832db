"""Runs that must be refused with one message, and nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from runner import Ran, cli, tree
from safetensors.torch import load_file, save_file

import llmprune

DEMO = Path(llmprune.__file__).parent / "demo" / "model"
QUICK = ("--samples", 2, "--seqlen", 32, "--quiet")


def refused(work: Path, *arguments: object, says: tuple[str, ...]) -> None:
    """The run must end as the user's mistake: the message has every text of `says`, and `work` stays as it is."""
    before = tree(work)
    is_refusal(cli(*arguments), says)
    assert tree(work) == before


def prune_refused(work: Path, *options: object, says: tuple[str, ...]) -> None:
    refused(work, "prune", work / "model", "--out", work / "out", *QUICK, *options, says=says)


def half_refused(work: Path, *options: object, says: tuple[str, ...]) -> None:
    prune_refused(work, "--sparsity", 0.5, *options, says=says)


def is_refusal(ran: Ran, says: tuple[str, ...]) -> None:
    assert ran.code == 2, ran.err
    assert ran.out == ""
    assert ran.err.startswith("error: ") and ran.err.count("error:") == 1, ran.err
    assert "Traceback" not in ran.err
    for text in says:
        assert text in ran.err


def edit_config(work: Path, **changes: object) -> None:
    path = work / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(work: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = work / "model" / "model.safetensors"
    state = load_file(path)
    change(state)
    path.unlink()
    save_file(state, path, metadata={"format": "pt"})
