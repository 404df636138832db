"""ReplaceMe: drop a window of layers, and let the MLP before it make up for them by a linear map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmprune.checkpoint.surgery import Surgery
from llmprune.engine.fold import folded, measure
from llmprune.engine.trunk import Trunk
from llmprune.methods.structural import TEXT, Decision, Drop
from llmprune.methods.windows import inner_window


@dataclass(frozen=True)
class ReplaceMe:
    """Least squares: A = argmin ||M A - (Y - R)||^2, then W_down <- A' W_down in the layer before the window.

    Shopkhoev et al. 2025, "ReplaceMe: Network Simplification via Depth Pruning and Transformer Block
    Linearization", eq. 5: M is what that layer's MLP adds, R the residual beside it, Y what leaves the window. The
    window is the one with the least angular distance. Deviation: the ridge term pulls towards the identity, not
    towards zero, so that no damping makes the map worse than plain dropping on the calibration text.

    `damping`: fraction of the mean of the diagonal of M'M; 0 is plain least squares.
    """

    damping: float = 0.01

    kind: ClassVar[str] = "depth"
    needs: ClassVar[frozenset[str]] = frozenset({TEXT})
    patterns: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2505.02819"
    takes_list: ClassVar[bool] = True
    memory: ClassVar[str] = "one layer, its activations, and those of n + 1 layers to find the window"

    def __post_init__(self) -> None:
        if self.damping < 0:
            raise ValueError(f"damping {self.damping} must not be negative")

    def decide(self, trunk: Trunk, drop: Drop) -> Decision:
        window, scores = inner_window(trunk, drop)
        before = window[0] - 1
        fit = measure(trunk, before, window[-1], lambda _, after: after)
        map_DD, error = fit.solve(self.damping)
        surgery = Surgery.drop(drop.depth, window).with_values(folded(trunk, before, map_DD))
        notes = {"squared_error_dropped": fit.error_before, "squared_error_fitted": error}
        return Decision(surgery, scores, {}, notes)
