"""The largest amount that is still good enough, when trying one is dear."""

from __future__ import annotations

from collections.abc import Callable


def bisect(count: int, within: Callable[[int], bool]) -> int:
    """The last of `count` rising levels that is `within`, -1 if none is; right if no level after a bad one is good."""
    good, bad = -1, count
    while bad - good > 1:
        middle = (good + bad) // 2
        if within(middle):
            good = middle
        else:
            bad = middle
    return good


def climb(count: int, start: int, within: Callable[[int], bool]) -> int:
    """From `start`, up while the next level is `within`, or down to the first that is; -1 if none is."""
    level = min(max(start, 0), count - 1)
    if within(level):
        while level + 1 < count and within(level + 1):
            level += 1
        return level
    while level >= 0 and not within(level):
        level -= 1
    return level
