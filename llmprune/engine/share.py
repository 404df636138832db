"""Which part of the calibration a process runs, and how the parts become a whole again."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from llmprune.arch.discover import Unit
from llmprune.engine.collect import Collector
from llmprune.ranks import ALONE, Ranks
from llmprune.statistics import Stats, Sums
from llmprune.types import RunError, UserError


@dataclass(frozen=True)
class Share:
    """The calibration `batches` of this process (keyword arguments of the model), with their numbers in the whole.

    `ordered`: sums run over batches in an order that does not depend on how they are shared out.
    `everywhere`: every process gets the whole statistics, not only the one that solves with them.
    """

    batches: list[Any]
    numbers: list[int] = field(default_factory=list)
    ranks: Ranks = ALONE
    ordered: bool = False
    everywhere: bool = False

    @classmethod
    def alone(cls, batches: list[Any]) -> Share:
        """All batches, in one process."""
        return cls(batches, list(range(len(batches))))

    @classmethod
    def of(cls, tokens: list[torch.Tensor], device: torch.device, ranks: Ranks, *, ordered: bool) -> Share:
        """What this process gets of all batches of token ids; raises UserError if there are too few to go round."""
        mine = share_out(tokens, ranks, ordered=ordered)
        return cls([{"input_ids": one.to(device)} for one in mine.values()], list(mine), ranks, ordered)

    def whole(self, collector: Collector, unit: Unit, wanted: set[str]) -> dict[str, Stats]:
        """The statistics of the `wanted` matrices that all processes collected; those that another has are not `whole`.

        A matrix that no token reached is not among them.
        """
        if self.ranks.count == 1:
            return collector.totals()
        groups = self._agree(collector, wanted)
        owners = _owners(unit, groups, self.ranks.count)
        device = next(unit.module.parameters()).device
        whole: dict[str, Stats] = {}
        for names, width in groups.items():
            sums = collector.sums.get(names[0]) or Sums(width, collector.kinds, device, ordered=self.ordered)
            stats = self._add_up(sums, None if self.everywhere else owners[names])
            whole.update(dict.fromkeys(names, stats))
        return whole

    def add_up(self, values: Iterable[float]) -> float:
        """The sum of a value over the batches of all processes: exact, so that their order does not matter."""
        return math.fsum(value for some in self.ranks.gather(list(values)) for value in some)

    def all_numbers(self) -> list[int]:
        """The numbers of all batches of all processes."""
        return sorted({number for some in self.ranks.gather(self.numbers) for number in some})

    def _agree(self, collector: Collector, wanted: set[str]) -> dict[tuple[str, ...], int]:
        """The groups of matrices that share an input, as all processes saw them, and their widths.

        An expert may have tokens in one process and none in another. Also settles the orientations.
        """
        mine: dict[int, tuple[list[str], int]] = {}
        for name, one in collector.sums.items():
            mine.setdefault(id(one), ([], one.width))[0].append(name)
        groups: dict[tuple[str, ...], int] = {}
        known: dict[str, tuple[str, ...]] = {}
        for at, seen, transposed in self.ranks.gather([sorted(wanted), list(mine.values()), collector.transposed]):
            if at != sorted(wanted):
                raise RunError("the order of this model depends on the data, so processes cannot share it; start one")
            for names, width in seen:
                group = tuple(names)
                if any(known.setdefault(name, group) != group for name in group):
                    raise RunError(f"{', '.join(group)} share an input in one process and not in another; exclude one")
                groups[group] = width
            for name, value in transposed.items():
                collector.transposed.setdefault(name, value)
        return groups

    def _add_up(self, sums: Sums, owner: int | None) -> Stats:
        if self.ordered:
            return self._in_order(sums, owner)
        stats = sums.total()
        tokens, paired, lacking = zip(*self.ranks.gather([stats.tokens, stats.paired, stats.lacking]), strict=True)
        own = stats.tokens
        stats.expect(sum(tokens), all(paired), max(lacking))
        stats.pool(self.ranks.sum_, owner, own)
        stats.whole = owner in (None, self.ranks.rank)
        return stats

    def _in_order(self, sums: Sums, owner: int | None) -> Stats:
        """All nodes of the tree come to their owner, who adds them up."""
        to = owner or 0
        described = self.ranks.gather(
            [[*key, node.tokens, node.paired, node.lacking] for key, node in sums.nodes().items()]
        )
        for source, nodes in enumerate(described):
            for level, place, *of in nodes:
                if self.ranks.rank == to != source:
                    sums.receive((level, place), *of)
                if source != to and self.ranks.rank in (source, to):
                    for tensor in sums.nodes()[level, place].tensors():
                        self.ranks.hand_over_(tensor, source, to)
        stats = sums.total()
        stats.whole = self.ranks.rank == to
        if owner is None:
            stats.replace(*self.ranks.tell([stats.tokens, stats.paired, stats.lacking]))
            for tensor in stats.tensors():
                self.ranks.broadcast_(tensor, to)
            stats.whole = True
        return stats


def share_out(tokens: list[torch.Tensor], ranks: Ranks, *, ordered: bool) -> dict[int, torch.Tensor]:
    """The token ids that this rank runs, by the number of their batch; raises UserError where one would get none.

    Sequences of every batch are dealt out, so that all ranks work on each; if `ordered`, whole
    batches are, since the same sequences in a smaller batch may round otherwise.
    """
    count = ranks.count

    def part(rank: int) -> dict[int, torch.Tensor]:
        if ordered:
            first, last = (len(tokens) * one // count for one in (rank, rank + 1))
            return dict(list(enumerate(tokens))[first:last])
        # a batch that does not divide gives its longer parts to other ranks than the batch before
        dealt = {number: ids.tensor_split(count)[(rank + number) % count] for number, ids in enumerate(tokens)}
        return {number: ids for number, ids in dealt.items() if len(ids)}

    if tokens and not all(part(rank) for rank in range(count)):
        number, what = (len(tokens), "batches") if ordered else (sum(map(len, tokens)), "sequences")
        raise UserError(
            f"{count} processes, but not enough calibration text for each (number of {what}: {number}); start fewer, "
            f"give more --samples{', or a smaller --batch-size' if ordered else ''}"
        )
    return part(ranks.rank)


def _owners(unit: Unit, groups: dict[tuple[str, ...], int], count: int) -> dict[tuple[str, ...], int]:
    """Which rank solves each group: the most expensive first, to whoever has least to do."""
    sizes = {spec.name: spec.count for spec in unit.matrices}
    # multiplications of a sweep over the columns, and of one factorization
    cost = {names: sum(sizes[name] for name in names) * width + width**3 / 3 for names, width in groups.items()}
    load, owners = [0.0] * count, {}
    for names in sorted(cost, key=lambda names: -cost[names]):
        owners[names] = load.index(min(load))
        load[owners[names]] += cost[names]
    return owners
