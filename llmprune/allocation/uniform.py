"""Every matrix gets the same amount."""

from __future__ import annotations

from llmprune.allocation import Dense
from llmprune.types import Budget


def uniform(dense: Dense, budget: Budget) -> dict[str, Budget]:
    return {spec.name: budget for spec in dense.specs}
