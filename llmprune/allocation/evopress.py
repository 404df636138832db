"""The amounts under which the model's answers change least, found by evolution over a database of solved levels."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from llmprune.allocation import Dense, Measured
from llmprune.allocation.fit import MOST, fit, refuse_pattern
from llmprune.engine.divergence import Variant
from llmprune.level_store import LevelStore
from llmprune.methods.weight.sparsegpt import SparseGPT
from llmprune.statistics import GRAM
from llmprune.types import Budget, Matrix, MatrixSpec

STEP = 0.05  # weights between two levels, as a share of those of the average matrix
REACH = 6  # levels above and below the budget
GENERATIONS = 25
OFFSPRING = 12
SURVIVORS = 2  # of them are compared with their parent on more text
FEW, MANY = 4, 16  # sequences of the calibration text in the first comparison and the second
SEED = 0

# The divergences of some choices of a level for each matrix, on so many sequences.
Fitness = Callable[[Sequence[list[int]], int], list[float]]


def evopress(dense: Dense, budget: Budget) -> dict[str, Budget]:
    """Sieberling et al. 2024, "EvoPress" (arXiv:2410.14649), algorithm 1.

    Every matrix is solved by SparseGPT, on the dense model's inputs, at levels that are a fixed number of weights apart.
    From the same amount everywhere, offspring trade levels between matrices, and the one whose next tokens diverge
    least from the dense model's (KL) is the next parent. Deviations: fewer and shorter comparisons (`GENERATIONS`,
    `FEW`, `MANY`). The levels take 13 times the matrices on disk, under TMPDIR; all offspring run together, a layer
    in memory. Raises UserError for an N:M pattern, and if the disk is too small.
    """
    refuse_pattern("evopress", budget)
    zeros = _levels(dense.specs, budget)
    with tempfile.TemporaryDirectory(prefix="llmprune-levels-") as folder:
        store = LevelStore(Path(folder))
        store.make_room(2 * REACH + 1, 4 * sum(spec.count for spec in dense.specs))
        reached: set[str] = set()

        def look(number: int, matrices: Measured) -> None:
            found: dict[int, dict[str, torch.Tensor]] = {level: {} for level in range(2 * REACH + 1)}
            for spec, weight_OI, stats in matrices():
                reached.add(spec.name)
                for level, count in enumerate(zeros[spec.name]):
                    edit = SparseGPT().solve(Matrix(spec.name, weight_OI), stats, Budget(count / spec.count))
                    laid_out = edit.weight_OI.T if spec.transposed else edit.weight_OI
                    found[level][spec.name] = laid_out.cpu().contiguous()
            for level, solved in found.items():
                store.save(str(level), number, solved)

        dense.measure(frozenset({GRAM}), look)
        places = {spec.name: place for place, spec in enumerate(dense.specs)}
        layers = {spec.name: number for number, layer in enumerate(dense.layers) for spec in layer}

        def variant(choice: list[int]) -> Variant:
            def values(matrices: Sequence[MatrixSpec]) -> dict[str, torch.Tensor]:
                found: dict[str, torch.Tensor] = {}
                by_level: dict[int, list[str]] = {}
                for name in (spec.name for spec in matrices if spec.name in places):
                    by_level.setdefault(choice[places[name]], []).append(name)
                for level, names in by_level.items():
                    found.update(store.load(str(level), layers[names[0]], names))
                return found

            return values

        def fitness(choices: Sequence[list[int]], sequences: int) -> list[float]:
            return dense.diverge([variant(choice) for choice in choices], sequences)

        # a matrix that no token reached has no levels to choose from, and keeps the budget
        lines = [
            zeros[spec.name] if spec.name in reached else [budget.pruned_of(spec.count)] * (2 * REACH + 1)
            for spec in dense.specs
        ]
        chosen = evolve(fitness, lines, random.Random(SEED))
    amounts = {spec.name: lines[place][chosen[place]] / spec.count for place, spec in enumerate(dense.specs)}
    return fit(dense.specs, budget, lambda shift: {name: one + shift for name, one in amounts.items()})


def evolve(fitness: Fitness, zeros: Sequence[Sequence[int]], rng: random.Random) -> list[int]:
    """The levels, one for each line of `zeros`, that evolution ends in; it starts in the middle of every line.

    An offspring raises and lowers as many levels as its parent, among those that change the number of zeros; a parent
    gives way only to one that is better on `MANY` sequences.
    """
    parent = [len(line) // 2 for line in zeros]
    (held,) = fitness([parent], MANY)
    for _ in range(GENERATIONS):
        offspring = [_mutated(parent, zeros, rng) for _ in range(OFFSPRING)]
        few = fitness(offspring, FEW)
        finalists = sorted(range(OFFSPRING), key=few.__getitem__)[:SURVIVORS]
        many = fitness([offspring[one] for one in finalists], MANY)
        if min(many) < held:
            held, parent = min(many), offspring[finalists[many.index(min(many))]]
    return parent


def _mutated(parent: list[int], zeros: Sequence[Sequence[int]], rng: random.Random) -> list[int]:
    levels = list(parent)
    for _ in range(min(rng.randint(1, 3), rng.randint(1, 3))):
        for way in (1, -1):
            open_ = [one for one, level in enumerate(levels) if 0 <= level + way < len(zeros[one])]
            free = [one for one in open_ if zeros[one][levels[one] + way] != zeros[one][levels[one]]]
            if not free:
                return list(parent)
            levels[rng.choice(free)] += way
    return levels


def _levels(specs: list[MatrixSpec], budget: Budget) -> dict[str, list[int]]:
    """Zeros of every matrix at each level, a fixed number apart; where that leaves 0 ... `MOST`, the last that does not."""
    step = max(round(STEP * sum(spec.count for spec in specs) / len(specs)), 1)
    found = {}
    for spec in specs:
        middle, most = budget.pruned_of(spec.count), int(MOST * spec.count)
        up, down = (most - middle) // step, middle // step
        found[spec.name] = [middle + step * max(min(one, up), -down) for one in range(-REACH, REACH + 1)]
    return found
