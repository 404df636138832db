"""Scores of single experts, from one pass; the lowest of every layer go."""

from __future__ import annotations

from collections.abc import Callable

from llmprune.checkpoint.surgery import Surgery
from llmprune.engine.experts import Load, expert_loads
from llmprune.engine.trunk import Trunk
from llmprune.methods.structural import Decision, DropExperts


def drop_lowest(
    trunk: Trunk, drop: DropExperts, score: Callable[[Load], list[float]], *, outputs: bool = True
) -> Decision:
    """Drop the same number of experts of every layer (of every group of its router), by their scores."""
    loads = expert_loads(trunk, drop.layers, drop.experts, outputs=outputs)
    scores = {index: dict(enumerate(score(load))) for index, load in loads.by_layer.items()}
    kept = {index: drop.lowest(one) for index, one in scores.items()}
    unseen = [[index, expert] for index, load in loads.by_layer.items() for expert in _unseen(load)]
    return Decision(
        Surgery(drop.depth, tuple(range(drop.depth)), kept),
        {(index, expert): value for index, one in scores.items() for expert, value in one.items()},
        loads.figures(),
        {"experts_without_tokens": unseen},
    )


def _unseen(load: Load) -> list[int]:
    return [expert for expert, count in enumerate(load.tokens.tolist()) if count == 0]
