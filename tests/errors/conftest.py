"""A copy of the demo model to be damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from refusals import DEMO


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder that holds a copy of the demo model as `model`; outputs would come beside it."""
    shutil.copytree(DEMO, tmp_path / "model")
    return tmp_path
