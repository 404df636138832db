"""Expert subsets: try every set of experts that could stay."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from llmprune.arch.discover import expert_blocks
from llmprune.checkpoint.skeleton import build_skeleton
from llmprune.checkpoint.surgery import Cutter, Surgery, edited_config
from llmprune.engine.trunk import Trunk
from llmprune.methods.structural import TEXT, Decision, DropExperts
from llmprune.types import UserError


@dataclass(frozen=True)
class ExpertSubset:
    """In every layer, the set of experts S that minimises ||F(x) - F_S(x)|| over the calibration tokens.

    Lu et al. 2024, "Not All Experts are Equal", section 3.1: F is the whole expert block, F_S the same block
    without the other experts and their router rows, on the inputs of the dense model. Every set is tried.

    `most`: refuse to try more sets than this in a layer.
    """

    most: int = 1000

    kind: ClassVar[str] = "expert"
    needs: ClassVar[frozenset[str]] = frozenset({TEXT})
    patterns: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2402.14800"
    takes_list: ClassVar[bool] = False
    memory: ClassVar[str] = "one layer twice, and its activations"

    def decide(self, trunk: Trunk, drop: DropExperts) -> Decision:
        sets = _subsets(drop, self.most)
        example = Surgery(drop.depth, tuple(range(drop.depth)), dict.fromkeys(drop.layers, sets[0]))
        config = edited_config(trunk.model, copy.deepcopy(trunk.model.config), example)
        small = build_skeleton(config, trunk.model.dtype)
        cutter = Cutter(trunk.model, small, example)
        kept: dict[int, tuple[int, ...]] = {}
        errors: dict[str, float] = {}
        states = trunk.enter()
        for index in range(max(drop.layers) + 1):
            with trunk.loaded(index):
                calls: list[tuple[torch.Tensor, torch.Tensor]] = []
                path = _parent_of_experts(trunk.units[index].module)
                if index in drop.layers:
                    block = trunk.units[index].module.get_submodule(path)
                    hook = block.register_forward_hook(
                        lambda _, args, out, calls=calls: calls.append((args[0], _first(out)))
                    )
                    states = trunk.run(index, states)
                    hook.remove()
                    losses = [_error(cutter, trunk, small, index, path, one, calls) for one in sets]
                    best = min(range(len(sets)), key=losses.__getitem__)
                    kept[index] = sets[best]
                    errors[str(index)] = losses[best]
                else:
                    states = trunk.run(index, states)
        notes = {"sets_tried": len(sets), "squared_error": errors}
        return Decision(Surgery(drop.depth, tuple(range(drop.depth)), kept), notes=notes)


def _subsets(drop: DropExperts, most: int) -> list[tuple[int, ...]]:
    """All sets of experts that may stay, equally many of each group."""
    size, stay = drop.experts // drop.groups, (drop.experts - drop.count) // drop.groups
    count = math.comb(size, stay) ** drop.groups
    if count > most:
        raise UserError(f"expert-subset would try {count:,} sets of experts in every layer, more than most={most:,}")
    groups = [itertools.combinations(range(start, start + size), stay) for start in range(0, drop.experts, size)]
    return [tuple(itertools.chain(*parts)) for parts in itertools.product(*groups)]


def _parent_of_experts(layer: nn.Module) -> str:
    return next((path.rpartition(".")[0] for path, _ in expert_blocks(layer)), "")


def _error(
    cutter: Cutter, trunk: Trunk, small: nn.Module, index: int, path: str, kept: tuple[int, ...], calls: list[Any]
) -> float:
    """The squared distance of the block's outputs with the experts `kept` from those with all."""
    prefix = f"{trunk.units[index].prefix}{path}."
    block = small.get_submodule(prefix[:-1])
    state = {}
    for short, tensor in trunk.units[index].module.get_submodule(path).state_dict().items():
        found = cutter.cut(prefix + short, prefix + short, tensor, index, kept)
        assert found is not None
        state[short] = found[1]
    block.load_state_dict(state, assign=True)
    return sum(float((_first(block(x)) - whole).double().square().sum()) for x, whole in calls)


def _first(output: Any) -> torch.Tensor:
    tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return tensor
