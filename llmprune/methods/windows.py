"""Methods that take out a window of layers and let the MLP before it make up for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from llmprune.checkpoint.surgery import Surgery
from llmprune.engine.fold import folded, measure
from llmprune.engine.similarity import turns
from llmprune.engine.trunk import States, Trunk
from llmprune.methods.structural import TEXT, Decision, Drop
from llmprune.types import UserError


@dataclass(frozen=True)
class FoldedWindow:
    """What such methods have in common; `damping`: fraction of the mean of the diagonal of M'M, M what the MLP adds."""

    damping: float = 0.01

    kind: ClassVar[str] = "depth"
    needs: ClassVar[frozenset[str]] = frozenset({TEXT})
    patterns: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[str] = "plain"
    takes_list: ClassVar[bool] = True
    memory: ClassVar[str] = "one layer, its activations, and those of n + 1 layers to find the window"

    def __post_init__(self) -> None:
        if self.damping < 0:
            raise ValueError(f"damping {self.damping} must not be negative")

    def fold(
        self, trunk: Trunk, drop: Drop, target: Callable[[States, States], States]
    ) -> tuple[Decision, float, float]:
        """Drop the window and fit the MLP before it to a target, given the states before and after the window.

        Also the squared distance from the target of plain dropping, and of the fit.
        """
        window, scores = inner_window(trunk, drop)
        before = window[0] - 1
        fit = measure(trunk, before, window[-1], target)
        map_DD, error = fit.solve(self.damping)
        surgery = Surgery.drop(drop.depth, window).with_values(folded(trunk, before, map_DD))
        return Decision(surgery, scores), fit.error_before, error


def inner_window(trunk: Trunk, drop: Drop) -> tuple[tuple[int, ...], dict[int, float]]:
    """The given layers or the best window by angular distance, but not from layer 0 on; and the distances."""
    if drop.given is not None:
        window = drop.window({})
        if window[0] == 0:
            raise UserError("layer 0 has no layer before it that could make up for it; keep it")
        return window, {}
    scores = {start: one for start, one in enumerate(turns(trunk, drop.count).angle) if start > 0}
    if not scores:
        raise UserError(f"{drop.count} of {drop.depth} layers leave none before the window; drop fewer")
    return drop.window(scores), scores
