"""Budgets that tests have in common, and what they are called in the names of tests."""

from __future__ import annotations

from llmprune.types import Budget, Pattern

ONE_OF_4, TWO_OF_4, FOUR_OF_8 = (Budget.of(None, Pattern(*pair)) for pair in ((1, 4), (2, 4), (4, 8)))


def label(value: object) -> str | None:
    """A name for a budget or a shape; anything else is named by pytest."""
    if isinstance(value, Budget):
        return str(value.pattern) if value.pattern.structured else f"{value.sparsity:g}"
    return "x".join(map(str, value)) if isinstance(value, tuple) else None
