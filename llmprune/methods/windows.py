"""The window of layers that a replacing method takes out."""

from __future__ import annotations

from llmprune.engine.similarity import turns
from llmprune.engine.trunk import Trunk
from llmprune.methods.structural import Drop
from llmprune.types import UserError


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
