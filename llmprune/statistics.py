"""What calibration remembers of the inputs of a matrix.

Statistics belong to an *input tensor*: matrices that read the same tensor (q, k and v; gate and
up) share one object, and so one Gram matrix and one factorization.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import torch

from llmprune.kernels.gram import cross_update_, gram_updates_
from llmprune.kernels.moments import Moments
from llmprune.kernels.product import product_nt
from llmprune.linalg import Factor, Scaled, reversed_cholesky, scaled, symmetric

GRAM = "gram"  # X'X, I x I
MOMENTS = "moments"  # per input: sum of squares, mean, variance
DRIFT = "drift"  # (X_dense - X)'X, I x I: how the inputs moved because earlier matrices were pruned
KINDS = frozenset({GRAM, MOMENTS, DRIFT})
# What is known of the weights themselves, before anything is pruned: gradients (see `types.Gradient`)
GRADIENTS = "gradients"  # of the loss
REGIONAL = "regional gradients"  # of the norm of the layer's own output
TURNED = "gradients and Hessian"  # of the loss, and its Hessian times them
CURVATURE = "gradients of outputs"  # sum over tokens of g g', O x O, g the gradient of the loss at a matrix's outputs
FISHER = "block Fisher"  # of the loss, and their products within blocks of consecutive weights
FLOW = "synaptic flow"  # gradients of what passes all weights at their absolute values: no text
OF_WEIGHTS = frozenset({GRADIENTS, REGIONAL, TURNED, CURVATURE, FISHER, FLOW})


def of_text(kinds: frozenset[str]) -> bool:
    """Whether statistics of these kinds take calibration text."""
    return bool(kinds - {FLOW})


class Stats:
    """Streaming statistics of inputs with `width` features, in float32 whatever the input dtype."""

    def __init__(self, width: int, kinds: frozenset[str], device: torch.device | str = "cpu") -> None:
        unknown = kinds - KINDS
        if unknown:
            raise ValueError(f"unknown statistics {sorted(unknown)}; there are {sorted(KINDS)}")
        self.width, self._device = width, device
        self.tokens = 0
        self._lower_II = torch.zeros(width, width, device=device) if GRAM in kinds else None
        self._moments = Moments(width, device) if MOMENTS in kinds else None
        self._drift_II = torch.zeros(width, width, device=device) if DRIFT in kinds else None
        self._lack_OI: torch.Tensor | None = None
        self.paired = DRIFT in kinds
        self.remark: str | None = None  # what the report should say of them
        self.whole = True  # False where another process has the sums over all of them
        self._derived: dict[Hashable, Any] = {}

    def update(
        self, x_TI: torch.Tensor, dense_TI: torch.Tensor | None = None, lack_TO: torch.Tensor | None = None
    ) -> None:
        """Add tokens. `x_TI`: any float dtype, T x width; `dense_TI`: the same tokens in the dense model.

        `lack_TO`: what the outputs are to make up for besides, where they are added to a stream that has moved too.
        Where the dense model's tokens are missing or cannot be paired, drift is given up (`paired` turns False).
        """
        update_together([Tokens(self, x_TI, dense_TI, lack_TO)])

    def _add_all_but_gram(
        self, x_TI: torch.Tensor, dense_TI: torch.Tensor | None, lack_TO: torch.Tensor | None
    ) -> None:
        self._derived.clear()
        if self._drift_II is not None:
            if dense_TI is None or dense_TI.shape != x_TI.shape:
                self.paired = False
            else:
                cross_update_(self._drift_II, dense_TI.float() - x_TI.float(), x_TI)
                if lack_TO is not None:
                    if self._lack_OI is None:
                        self._lack_OI = torch.zeros(lack_TO.shape[1], self.width, device=x_TI.device)
                    cross_update_(self._lack_OI, lack_TO, x_TI)
        self.tokens += x_TI.shape[0]
        if self._moments is not None:
            self._moments.update(x_TI)

    @property
    def lacking(self) -> int:
        """How many outputs have something to make up for: the rows of what `update` was given as lacking."""
        return 0 if self._lack_OI is None else len(self._lack_OI)

    def expect(self, tokens: int, paired: bool, lacking: int) -> None:
        """What the statistics will be of, when their tensors have been filled or added up."""
        self._derived.clear()
        self.tokens, self.paired = tokens, paired
        if lacking and self._lack_OI is None:
            self._lack_OI = torch.zeros(lacking, self.width, device=self._device)

    def replace(self, tokens: int, paired: bool, lacking: int) -> None:
        """As `expect`, where the tensors are about to be overwritten by those of another process."""
        self.expect(tokens, paired, lacking)
        if self._moments is not None:
            self._moments.tokens = tokens

    def tensors(self) -> list[torch.Tensor]:
        """Everything that is summed, in a fixed order."""
        return self._products() + (self._moments.tensors() if self._moments is not None else [])

    def merge(self, later: Stats) -> None:
        """Add the statistics of further tokens."""
        self.expect(self.tokens + later.tokens, self.paired and later.paired, later.lacking)
        for mine, other in (
            (self._lower_II, later._lower_II),
            (self._drift_II, later._drift_II),
            (self._lack_OI, later._lack_OI),
        ):
            if mine is not None and other is not None:
                mine += other
        if self._moments is not None and later._moments is not None:
            self._moments.merge(later._moments)

    def pool(self, sum_: Callable[..., None], to: int | None, own: int) -> None:
        """Add up what all processes have, this one of `own` tokens; `expect` has said of what that is.

        `sum_(tensor, to)` adds a tensor up over the processes, in place, for one of them or (None) for all.
        """
        for one in self._products():
            sum_(one, to)
        if self._moments is not None:
            self._moments.pool(own, self.tokens, sum_)

    def _products(self) -> list[torch.Tensor]:
        return [one for one in (self._lower_II, self._drift_II, self._lack_OI) if one is not None]

    @property
    def gram_II(self) -> torch.Tensor:
        """The full symmetric Gram matrix X'X (a fresh tensor)."""
        return symmetric(self.gram_lower_II)

    @property
    def gram_lower_II(self) -> torch.Tensor:
        """X'X of which only the lower triangle is valid: what the kernels fill."""
        if self._lower_II is None:
            raise ValueError("this statistics object holds no Gram matrix: the method must name it in `needs`")
        return self._lower_II

    @property
    def has_gram(self) -> bool:
        return self._lower_II is not None

    @property
    def drift_II(self) -> torch.Tensor:
        """(X_dense - X)'X: row i belongs to feature i of the dense model's input, column j to this one's."""
        if self._drift_II is None:
            raise ValueError("this statistics object holds no drift: the method must name it in `needs`")
        return self._drift_II

    def pull_OI(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """(what the outputs of the dense weights lack)'X, O x I: W (X_dense - X)'X, and what the stream lacks."""
        pull_OI = product_nt(weight_OI, self.drift_II.T)
        return pull_OI if self._lack_OI is None else pull_OI.add_(self._lack_OI)

    @property
    def square_sums_I(self) -> torch.Tensor:
        """Sum over tokens of x_j squared: the diagonal of the Gram matrix."""
        if self._moments is not None:
            return self._moments.square_sums_I
        return self.gram_lower_II.diagonal().clone()

    @property
    def mean_I(self) -> torch.Tensor:
        return self._need_moments().mean_I

    @property
    def variance_I(self) -> torch.Tensor:
        """Population variance over tokens."""
        return self._need_moments().variance_I

    def derived(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """A value computed from these statistics once (a factorization), dropped when tokens are added."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]

    def scaled(self, damping: float) -> Scaled:
        """The Gram matrix brought to unit diagonal, with `damping` added: computed once."""
        system: Scaled = self.derived(("scaled", damping), lambda: scaled(self.gram_lower_II, damping))
        return system

    def factor(self, damping: float) -> Factor:
        """The factor of the Gram matrix damped by that fraction of its mean diagonal: computed once."""
        key = ("reversed_cholesky", damping)
        factor: Factor = self.derived(key, lambda: reversed_cholesky(self.gram_lower_II, damping))
        return factor

    def _need_moments(self) -> Moments:
        if self._moments is None:
            raise ValueError("this statistics object holds no moments: the method must name them in `needs`")
        return self._moments


class Tokens(NamedTuple):
    """What statistics are to take in: the operands of `Stats.update`."""

    stats: Stats
    x_TI: torch.Tensor
    dense_TI: torch.Tensor | None = None
    lack_TO: torch.Tensor | None = None


def update_together(updates: Iterable[Tokens]) -> None:
    """`Stats.update` of several, one after the other; on a GPU their Gram matrices of one width grow in one launch."""
    pairs = []
    for stats, x_TI, dense_TI, lack_TO in updates:
        stats._add_all_but_gram(x_TI, dense_TI, lack_TO)
        if stats.has_gram:
            pairs.append((stats.gram_lower_II, x_TI))
    gram_updates_(pairs)


class Sums:
    """Statistics that grow batch by batch.

    `ordered`: they are added up along a binary tree of which batch b is leaf b, the lower half first, so that
    the sums depend on no batch's time or place. It holds about log2(batches) statistics instead of one.
    """

    def __init__(self, width: int, kinds: frozenset[str], device: torch.device | str = "cpu", *, ordered: bool) -> None:
        self.width = width
        self._kinds, self._device, self._ordered = kinds, device, ordered
        self._nodes: dict[tuple[int, int], Stats] = {}  # by height and place
        self._leaf = 0
        self._growing: Stats | None = None

    def of(self, batch: int) -> Stats:
        """The statistics that take in the tokens of a batch; those of the batch before are complete."""
        leaf = batch if self._ordered else 0
        if self._growing is None or leaf != self._leaf:
            self._settle()
            self._leaf, self._growing = leaf, self._make()
        return self._growing

    def nodes(self) -> dict[tuple[int, int], Stats]:
        """What the tree has so far: the sums of whole subtrees."""
        self._settle()
        return self._nodes

    def receive(self, key: tuple[int, int], tokens: int, paired: bool, lacking: int) -> None:
        """Make room for a node of another process, whose tensors are about to be filled."""
        self.nodes()[key] = node = self._make()
        node.replace(tokens, paired, lacking)

    def total(self) -> Stats:
        """The statistics of all batches; no more may come."""
        self._settle()
        nodes = self._nodes
        while len(nodes) > 1:
            height = min(level for level, _ in nodes)
            for level, place in sorted(key for key in nodes if key[0] == height):
                if (level, place) in nodes:
                    self._join(level, place)
        return next(iter(nodes.values()), None) or self._make()

    def _make(self) -> Stats:
        return Stats(self.width, self._kinds, self._device)

    def _settle(self) -> None:
        """The growing leaf is complete; a subtree whose two halves are complete is one node."""
        if self._growing is None:
            return
        key = (0, self._leaf)
        self._nodes[key], self._growing = self._growing, None
        while (key[0], key[1] ^ 1) in self._nodes:
            key = self._join(*key)

    def _join(self, level: int, place: int) -> tuple[int, int]:
        """Replace a node and its sibling, if there is one, by their parent."""
        halves = [self._nodes.pop((level, one), None) for one in (place & ~1, place | 1)]
        first, *rest = [one for one in halves if one is not None]
        for later in rest:
            first.merge(later)
        self._nodes[level + 1, place >> 1] = first
        return level + 1, place >> 1
