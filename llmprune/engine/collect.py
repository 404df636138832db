"""Run a module on captured inputs and gather the statistics of every product in it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from llmprune.arch.discover import expert_blocks
from llmprune.engine.dense import Inputs
from llmprune.engine.observe import InputKey, Observe, Product, input_key
from llmprune.engine.suspend import Call
from llmprune.statistics import Sums
from llmprune.types import RunError

IN_PLACE = "in place, so what it was is lost when the layer has run: try --schedule module"


class _Enough(BaseException):
    """Raised inside a forward once every product has been seen: the rest of it would be wasted."""


class Collector:
    """Statistics of the inputs of `wanted` parameters, shared between products that read the same tensor."""

    def __init__(self, wanted: dict[str, nn.Parameter], kinds: frozenset[str], *, ordered: bool = False) -> None:
        self._wanted = wanted
        self.kinds, self._ordered = kinds, ordered
        self._seen: list[tuple[Product, InputKey]] = []
        self._muted = False  # what is seen meanwhile does not count
        self._replayed: dict[str, list[torch.Tensor]] | None = None  # where inputs of a replay go
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
    ) -> None:
        """Call `module` on every captured `(args, kwargs)`; outputs are dropped.

        `all_experts`: every token counts for every expert. `dense`: what each call's matrices see in the
        dense model, to be compared with what they see here. `numbers`: of the batches, if not from 0.
        """
        # held by no attribute: a cycle would keep the weights of a finished layer until the next collection
        observe = Observe(self._wanted, self._see)
        blocks = [block for _, block in expert_blocks(module)]
        for place, (number, (args, kwargs)) in enumerate(zip(numbers or itertools.count(), calls, strict=False)):
            given = [(one, one._version) for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
            beside = dense[place] if dense is not None else None
            with contextlib.suppress(_Enough), observe, self._at_blocks(blocks, all_experts, beside):
                module(*args, **kwargs)
            if any(one._version != version for one, version in given):
                raise RunError(f"{type(module).__name__} changes its own input {IN_PLACE}")
            if not blocks:
                # the first batch tells how many products there are; later ones stop at the last
                self._enough = len(self._seen)
            self._accumulate(number, beside)

    def add(self, product: Product, batch: int, dense: Inputs | None) -> None:
        """Take in one product that was seen elsewhere."""
        self._see([product])
        self._accumulate(batch, dense)

    def _see(self, products: list[Product]) -> None:
        if self._replayed is not None:
            for one in products:
                self._replayed.setdefault(one.name, []).append(one.x_TI)
            return
        if self._muted:
            return
        self._seen.extend((one, input_key(one.x_TI)) for one in products)
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
            for its_args, its_kwargs in _one_expert_each(block, args, kwargs) if all_experts else [(args, kwargs)]:
                if all_experts:
                    block(*its_args, **its_kwargs)
                if dense is not None and dense.blocks.get(block) and _routing(args, kwargs) is not None:
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

    def _accumulate(self, batch: int, dense: Inputs | None) -> None:
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
        for names in groups.values():
            sums = self._shared(names, inputs[names[0]][0].x_TI)
            if id(sums) in updated:
                raise RunError(f"{names[0]} shares its input in one batch and not in another; exclude it")
            updated.add(id(sums))
            for product in inputs[names[0]]:
                beside = [dense.next_of(name) for name in names] if dense is not None else [None]
                stats = sums.update(batch, product.x_TI, beside[0])
                if not bool(torch.isfinite(stats.square_sums_I).all()):
                    self._check_weights()
                    raise RunError(_not_finite(product.x_TI, product.name, batch))
        self._seen.clear()

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


def _one_expert_each(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Call]:
    """A call of an expert block once per expert, with every token routed to it."""
    fused = next((one for one in block.parameters(recurse=False) if one.dim() == 3), None)
    if fused is None:
        raise RunError(f"calibration.all_experts: {type(block).__name__} does not fuse its experts; leave it off")
    routing = _routing(args, kwargs)
    if routing is None:
        raise RunError("calibration.all_experts: this model's expert block takes no expert index, so it cannot be had")
    for expert in range(len(fused)):
        yield (
            tuple(_to_one_expert(one, routing, expert) for one in args),
            {key: _to_one_expert(one, routing, expert) for key, one in kwargs.items()},
        )


def _routing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The argument of an expert block that holds the chosen experts, tokens x choices."""
    return next((one for one in (*args, *kwargs.values()) if _is_index(one)), None)


def _to_one_expert(value: Any, routing: torch.Tensor, expert: int) -> Any:
    """An argument with its routing replaced: the chosen experts become `expert`, their weights 1."""
    if value is routing:
        return torch.full_like(routing[:, :1], expert)
    if isinstance(value, torch.Tensor) and value.shape == routing.shape:
        return torch.ones_like(value[:, :1])
    return value


def _is_index(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 2 and not value.is_floating_point()
