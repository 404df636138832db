"""Whole and killed runs that several tests start from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from durable import kill, run
from runner import cli, count_steps


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    ran = cli(*run(out))
    assert ran.code == 0, ran.err
    return out


@pytest.fixture(scope="session")
def steps(tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many steps such a run takes."""
    folder = tmp_path_factory.mktemp("steps")
    return count_steps(*run(folder / "out"), folder=folder)


@pytest.fixture(scope="session")
def killed(steps: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves that was killed half-way."""
    out = tmp_path_factory.mktemp("killed") / "out"
    kill(out, steps * 2 // 5)
    return out.with_name("out.partial")


@pytest.fixture
def half(killed: Path, tmp_path: Path) -> Path:
    """The output of a run that was killed half-way: only its partial folder is there."""
    shutil.copytree(killed, tmp_path / "out.partial")
    return tmp_path / "out"
