"""Methods that remove attention or MLP of a layer: what becomes of the checkpoint."""

from __future__ import annotations

from collections.abc import Collection

import torch

from llmprune.arch.sublayers import HALVES, halves
from llmprune.checkpoint.surgery import Surgery
from llmprune.engine.search import Part
from llmprune.engine.trunk import Trunk
from llmprune.types import UserError

NOTE = (
    "no plain model class has layers without attention or MLP: where only one half goes, its last matrix is filled "
    "with zeros, which is exact but not smaller"
)


def remove_parts(trunk: Trunk, parts: Collection[Part]) -> Surgery:
    """A layer whose halves are both gone is dropped; of one that loses a half, the writing matrices become zero."""
    both = [index for index in range(trunk.depth) if all((index, half) in parts for half in HALVES)]
    if len(both) == trunk.depth:
        raise UserError("every layer would go; drop fewer")
    zeros: dict[str, torch.Tensor] = {}
    for index, half in sorted(parts):
        if index not in both:
            unit = trunk.units[index]
            for name in halves(unit.module)[half].parameters:
                zeros[unit.prefix + name] = torch.zeros(unit.module.get_parameter(name).shape)
    return Surgery.drop(trunk.depth, both).with_values(zeros)
