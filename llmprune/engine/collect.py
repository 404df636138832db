"""Run a module on captured inputs and gather the statistics of every product in it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from llmprune.arch.discover import expert_blocks
from llmprune.engine.dense import Inputs
from llmprune.engine.observe import InputKey, Observe, Product, input_key
from llmprune.engine.routing import Routed, one_expert_each, routing
from llmprune.engine.suspend import Call, first_tensor
from llmprune.statistics import Stats, Sums, Tokens, update_together
from llmprune.types import RunError

IN_PLACE = "in place, so what it was is lost when the layer has run: try --schedule module"


class _Enough(BaseException):
    """Raised inside a forward once every product has been seen: the rest of it would be wasted."""


class Collector:
    """Statistics of the inputs of the `counted` matrices, shared between products that read the same tensor.

    `wanted`: the parameters that are watched; None for `counted`: all of them count. `ordered`: see `Sums`.
    """

    def __init__(
        self,
        wanted: dict[str, nn.Parameter],
        kinds: frozenset[str],
        counted: set[str] | None = None,
        *,
        ordered: bool = False,
    ) -> None:
        self._wanted = wanted
        self.kinds, self._ordered = kinds, ordered
        self._counted = counted
        self._seen: list[tuple[Product, InputKey]] = []
        self._muted = False  # what is seen meanwhile does not count
        self._replayed: dict[str, list[torch.Tensor]] | None = None  # where inputs of a replay go
        self._routed: Routed | None = None  # of the present call, where its experts are to share a goal
        self._enough: int | None = None
        self.sums: dict[str, Sums] = {}
        self.transposed: dict[str, bool] = {}

    def run(
        self,
        module: nn.Module,
        calls: Iterable[Call],
        *,
        all_experts: bool = False,
        dense: list[Inputs] | None = None,
        numbers: Iterable[int] | None = None,
        goals: Sequence[torch.Tensor] = (),
    ) -> None:
        """Call `module` on every captured `(args, kwargs)`; outputs are dropped.

        `all_experts`: every token counts for every expert. `dense`: what each call's matrices see in the
        dense model, to be compared with what they see here. `numbers`: of the batches, if not from 0. `goals`: what
        `module`, an expert block, should put out (tokens x width), which its experts then share.
        """
        # held by no attribute: a cycle would keep the weights of a finished layer until the next collection
        observe = Observe(self._wanted, self._see)
        blocks = [block for _, block in expert_blocks(module)]
        for place, (number, (args, kwargs)) in enumerate(zip(numbers or itertools.count(), calls, strict=False)):
            given = [(one, one._version) for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
            beside = dense[place] if dense is not None else None
            self._routed = Routed.of(module, args, kwargs) if goals else None
            with contextlib.suppress(_Enough), observe, self._at_blocks(blocks, all_experts, beside):
                output = module(*args, **kwargs)
            if any(one._version != version for one, version in given):
                raise RunError(f"{type(module).__name__} changes its own input {IN_PLACE}")
            if not blocks:
                # the first batch tells how many products there are; later ones stop at the last
                self._enough = len(self._seen)
            shared = self._routed is not None
            self._accumulate(number, beside, goals[place] - _rows(first_tensor(output)) if shared else None)

    def totals(self) -> dict[str, Stats]:
        """The statistics of every matrix that a token reached."""
        return {name: one.total() for name, one in self.sums.items()}

    def add(self, product: Product, batch: int, dense: Inputs | None, lack_TO: torch.Tensor | None = None) -> None:
        """Take in one product that was seen elsewhere, and what its outputs are to make up for."""
        self._see([product])
        self._accumulate(batch, dense, lack_TO)

    def _see(self, products: list[Product]) -> None:
        if self._replayed is not None:
            for one in products:
                self._replayed.setdefault(one.name, []).append(one.x_TI)
            return
        if self._muted:
            return
        for one in products:
            if self._counted is None or one.name in self._counted:
                self._seen.append((one, input_key(one.x_TI)))
            elif self._routed is not None and not _in_order(one, self._routed):
                self._routed = None
        if len(self._seen) == self._enough:
            raise _Enough

    @contextlib.contextmanager
    def _at_blocks(self, blocks: list[nn.Module], all_experts: bool, dense: Inputs | None) -> Iterator[None]:
        """While active, calls of expert blocks are first repeated as the statistics need them.

        For `all_experts`, with all tokens to each expert in turn, and the real call does not count; with
        `dense`, also on the dense model's input, routed as here, whose inputs go to `dense`.
        """
        busy = False

        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal busy
            if busy or not (all_experts or dense):
                return
            busy = True
            for its_args, its_kwargs in one_expert_each(block, args, kwargs) if all_experts else [(args, kwargs)]:
                if all_experts:
                    block(*its_args, **its_kwargs)
                if dense is not None and dense.blocks.get(block) and routing(args, kwargs) is not None:
                    self._replayed = dense.products
                    block(dense.blocks[block][0], *its_args[1:], **its_kwargs)
                    self._replayed = None
            busy = False
            if dense is not None and dense.blocks.get(block):
                dense.blocks[block].pop(0)
            self._muted = all_experts

        def after(block: nn.Module, args: Any, output: Any) -> None:
            if not busy:
                self._muted = False

        with contextlib.ExitStack() as stack:
            for block in blocks:
                stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(after).remove)
            yield

    def _accumulate(self, batch: int, dense: Inputs | None, lack_TO: torch.Tensor | None = None) -> None:
        # a matrix used twice has two inputs; matrices with the same inputs share their statistics
        inputs: dict[str, list[Product]] = {}
        keys: dict[str, tuple[InputKey, ...]] = {}
        for product, key in self._seen:
            self.transposed.setdefault(product.name, product.transposed)
            if not len(product.x_TI):
                continue
            if input_key(product.x_TI) != key:
                raise RunError(f"the input of {product.name} is changed {IN_PLACE}")
            inputs.setdefault(product.name, []).append(product)
            keys[product.name] = (*keys.get(product.name, ()), key)
        groups: dict[tuple[InputKey, ...], list[str]] = {}
        for name, its_keys in keys.items():
            groups.setdefault(its_keys, []).append(name)
        updated: set[int] = set()
        together: list[Tokens] = []
        grown: list[tuple[Product, Stats]] = []
        for names in groups.values():
            sums = self._shared(names, inputs[names[0]][0].x_TI)
            if id(sums) in updated:
                raise RunError(f"{names[0]} shares its input in one batch and not in another; exclude it")
            updated.add(id(sums))
            for product in inputs[names[0]]:
                beside = [dense.next_of(name) for name in names] if dense is not None else [None]
                stats = sums.of(batch)
                grown.append((product, stats))
                if self._routed is None or lack_TO is None or product.index is None:
                    together.append(Tokens(stats, product.x_TI, beside[0], lack_TO))
                else:
                    # what the block lacks holds all that has moved: these inputs are compared with themselves
                    gated_TI = self._routed.tokens_of(product.index)[1].float()[:, None] * product.x_TI
                    stats.update(gated_TI, gated_TI, self._routed.share_of(product.index, lack_TO))
        update_together(together)
        self._seen.clear()
        finite = [torch.isfinite(stats.square_sums_I).all() for _, stats in grown]
        if finite and not bool(torch.stack(finite).all()):  # asked once a batch: a GPU has to be waited for
            self._check_weights()
            bad = next(product for (product, _), fine in zip(grown, finite, strict=True) if not fine)
            raise RunError(_not_finite(bad.x_TI, bad.name, batch))

    def _check_weights(self) -> None:
        """Where an input is not finite, a matrix before it may be the cause; raises RunError if so."""
        for name, parameter in self._wanted.items():
            if not bool(torch.isfinite(parameter).all()):
                raise RunError(f"{name} holds NaN or infinity; the checkpoint is damaged: download it again")

    def _shared(self, names: list[str], x_TI: torch.Tensor) -> Sums:
        known = {id(self.sums[name]) for name in names if name in self.sums}
        if len(known) > 1:
            raise RunError(f"{', '.join(names)} share an input in one batch and not in another; exclude one of them")
        sums = next((self.sums[name] for name in names if name in self.sums), None)
        sums = sums or Sums(x_TI.shape[1], self.kinds, x_TI.device, ordered=self._ordered)
        self.sums.update(dict.fromkeys(names, sums))
        return sums


def _not_finite(x_TI: torch.Tensor, name: str, batch: int) -> str:
    """What to say of an input whose statistics are not finite."""
    bad = int((~torch.isfinite(x_TI)).any(1).sum())
    what = f"NaN or infinity for {bad} of {len(x_TI)} tokens" if bad else "values whose squares overflow float32"
    return (
        f"the input of {name} holds {what} in calibration batch {batch}; "
        "the checkpoint may be damaged, or the dtype too narrow: try --dtype float32"
    )


def _rows(output: torch.Tensor) -> torch.Tensor:
    return output.reshape(-1, output.shape[-1])


def _in_order(product: Product, routed: Routed) -> bool:
    """Whether an expert takes its tokens in the order that `routed` gives them."""
    if product.index is None:
        return False
    rows_N = routed.tokens_of(product.index)[0]
    return torch.equal(product.x_TI, routed.hidden_TD[rows_N])
