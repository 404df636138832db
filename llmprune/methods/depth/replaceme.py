"""ReplaceMe: drop a window of layers, and let the MLP before it make up for them by a linear map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmprune.engine.trunk import Trunk
from llmprune.methods.structural import Decision, Drop
from llmprune.methods.windows import FoldedWindow


@dataclass(frozen=True)
class ReplaceMe(FoldedWindow):
    """Least squares: A = argmin ||M A - (Y - R)||^2, then W_down <- A' W_down in the layer before the window.

    Shopkhoev et al. 2025, "ReplaceMe: Network Simplification via Depth Pruning and Transformer Block
    Linearization", eq. 5: M is what that layer's MLP adds, R the residual beside it, Y what leaves the window. The
    window is the one with the least angular distance. Deviation: the ridge term pulls towards the identity, not
    towards zero, so that no damping makes the map worse than plain dropping on the calibration text.
    """

    paper: ClassVar[str] = "arXiv:2505.02819"

    def decide(self, trunk: Trunk, drop: Drop) -> Decision:
        decision, dropped, fitted = self.fold(trunk, drop, lambda _, after: after)
        decision.notes = {"squared_error_dropped": dropped, "squared_error_fitted": fitted}
        return decision
