"""Methods that remove attention or MLP of a layer: what becomes of the model."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from llmprune.arch.sublayers import HALVES
from llmprune.checkpoint.surgery import Surgery
from llmprune.engine.search import Part
from llmprune.engine.trunk import Trunk
from llmprune.types import UserError


def remove_parts(trunk: Trunk, parts: Collection[Part]) -> Surgery:
    """A layer whose halves are both gone is dropped; one that loses a half keeps the other."""
    both = [index for index in range(trunk.depth) if all((index, half) in parts for half in HALVES)]
    if len(both) == trunk.depth:
        raise UserError("every layer would go; drop fewer")
    silent: dict[int, tuple[str, ...]] = {index: (half,) for index, half in sorted(parts) if index not in both}
    return replace(Surgery.drop(trunk.depth, both), silent=silent)
