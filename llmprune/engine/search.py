"""The loss of the model without each of its parts, and the greedy search that asks for it again and again.

All variants go through the layers together: while a layer's weights are loaded, the model itself and
every variant that lacks an earlier part run through it. A variant begins where it differs from the
model, so the layers before are never run again; one round reads the weights once, or once for every chunk of the
text where the activations of all variants do not fit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from llmprune.arch.sublayers import HALVES, halves
from llmprune.engine.trunk import States, Trunk, silenced
from llmprune.memory import unused
from llmprune.types import RunError

# A part of the model: a layer, or the attention or MLP of one.
Part = tuple[int, str]
WHOLE = "layer"


@dataclass
class Found:
    """What a greedy search removed, in order, and the loss after each removal; `first` is the first round."""

    removed: list[Part] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    first: dict[Part, float] = field(default_factory=dict)
    dense: float = 0.0


# The states of a variant (None: the model itself) on entering each layer.
Paths = dict[Part | None, dict[int, States]]
# The share of the free memory that the states of all variants may take, those kept for the next round included.
SHARE = 0.25


def greedy(trunk: Trunk, parts: Sequence[Part], count: int) -> Found:
    """Remove `count` of `parts`, each time the one without which the loss is lowest; ties to the lowest index.

    Where memory allows, the states of all variants at all layers are kept: up to the part that was removed
    nothing has changed, so the next round begins there.
    """
    found = Found()
    gone: set[Part] = set()
    # a variant has states from the layer on where it begins: half of all layers on average
    paths: Paths | None = {} if _bytes(trunk, len(parts)) * trunk.depth // 2 <= _room(trunk) else None
    for _ in range(count):
        left = [part for part in parts if part not in gone]
        losses, whole = losses_without(trunk, left, gone, paths, found.removed[-1][0] if paths else 0)
        if not gone:
            found.first, found.dense = losses, whole
        best = min(left, key=lambda part: (losses[part], part))
        gone.add(best)
        found.removed.append(best)
        found.losses.append(losses[best])
    return found


def losses_without(
    trunk: Trunk, parts: Sequence[Part], gone: set[Part], paths: Paths | None = None, start: int = 0
) -> tuple[dict[Part, float], float]:
    """The loss of the model that lacks `gone`, without each of `parts` besides, and with all of them.

    Holds one layer and the activations of as many variants as there are parts, for as many batches at a time as fit
    into memory; the layers are then loaded once for every such chunk. `paths` receives the states on the way, for all batches;
    where it has those on entering layer `start` already, all begin there.
    """
    size = max(1, len(trunk.batches) * _room(trunk) // _bytes(trunk, len(parts)))
    chunks = [trunk] if paths is not None or size >= len(trunk.batches) else trunk.split(size)
    losses: dict[Part | None, list[float]] = {}
    for chunk in chunks:
        for part, states in _variants(chunk, parts, gone, paths, start).items():
            losses.setdefault(part, []).extend(chunk.losses(states))
    # together the chunks ran each layer on all batches as often as each of them on its own
    trunk.runs += chunks[0].runs if chunks[0] is not trunk else 0
    # exact sums, which do not depend on the chunks
    means = {part: math.fsum(one) / trunk.scored() for part, one in losses.items()}
    return {part: means[part] for part in parts}, means[None]


def _variants(
    trunk: Trunk, parts: Sequence[Part], gone: set[Part], paths: Paths | None, start: int
) -> dict[Part | None, States]:
    """What leaves the last layer of the model (None), and of each variant that lacks one part more."""
    before = paths[None][start] if paths else trunk.enter()
    variants: dict[Part | None, States] = {None: before}
    if paths:
        for part in parts:
            if part[0] < start:
                variants[part] = paths[part][start]
    for index in range(start, trunk.depth):
        if paths is not None:
            for one, states in variants.items():
                paths.setdefault(one, {})[index] = states
        here = [part for part in parts if part[0] == index]
        if _skipped(index, gone) == set(HALVES):
            variants.update(dict.fromkeys(here, variants[None]))
            continue
        with trunk.loaded(index):
            fresh: dict[Part | None, States] = {
                part: run_without(trunk, index, variants[None], gone | {part}) for part in here
            }
            for one, states in variants.items():
                variants[one] = run_without(trunk, index, states, gone)
            variants.update(fresh)
    return variants


def _bytes(trunk: Trunk, variants: int) -> int:
    """What the states of the model and all variants take at one layer, entering and leaving it."""
    tokens = sum(batch["input_ids"].numel() for batch in trunk.batches)
    width: int = trunk.model.config.get_text_config().hidden_size
    found: int = tokens * width * trunk.model.dtype.itemsize * (variants + 2)
    return found


def _room(trunk: Trunk) -> int:
    """The bytes that states may take."""
    return int(SHARE * unused(trunk.batches[0]["input_ids"].device))


def run_without(trunk: Trunk, index: int, states: States, gone: set[Part], *, batches: range | None = None) -> States:
    """Layer `index`, on all (or some) batches, without those of its parts that are gone."""
    missing = _skipped(index, gone)
    if missing == set(HALVES):
        return states
    with _silent(trunk, index, missing):
        return trunk.run(index, states, batches=batches)


def check_halves(trunk: Trunk) -> None:
    """Whether each layer without its two halves hands on what it gets; raises RunError. Runs one batch."""
    states = trunk.enter()
    for index in range(trunk.depth):
        with trunk.loaded(index), _silent(trunk, index, set(HALVES)):
            output = trunk.apply(index, 0, states[0])
        # a sum with zeros is exact
        if not bool((output == states[0]).all()):
            raise RunError(
                f"{trunk.units[index].name} does something besides attention and MLP, so its halves cannot be removed"
            )


def _skipped(index: int, gone: set[Part]) -> set[str]:
    kinds = {kind for layer, kind in gone if layer == index}
    return set(HALVES) if WHOLE in kinds else kinds


@contextlib.contextmanager
def _silent(trunk: Trunk, index: int, missing: set[str]) -> Iterator[None]:
    layer = trunk.units[index].module
    if not missing:
        yield
        return
    parts = halves(layer)
    with silenced([module for half in missing for module in parts[half].modules(layer)]):
        yield
