"""Shared by all tests: one thread each, since matrices here are tiny and tests run side by side."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["HF_HUB_OFFLINE"] = "1"
# Before anything imports triton, whose own functions are made when it is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

import llmprune

torch.set_num_threads(1)

DEMO = Path(llmprune.__file__).parent / "demo" / "model"
SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder that holds a copy of the demo model as `model`; outputs would come beside it."""
    shutil.copytree(DEMO, tmp_path / "model")
    return tmp_path


@pytest.fixture
def shared() -> Path:
    """The folder of real models and texts beside the checkout."""
    if not (SHARED / "models").is_dir():
        pytest.skip("needs ../shared with the real models and texts")
    return SHARED
