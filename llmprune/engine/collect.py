"""Run a module on captured inputs and gather the statistics of every product in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from llmprune.arch.discover import expert_blocks
from llmprune.engine.observe import InputKey, Observe, Product, input_key
from llmprune.statistics import Stats
from llmprune.types import RunError

Call = tuple[tuple[Any, ...], dict[str, Any]]

IN_PLACE = "in place, so what it was is lost when the layer has run: try --schedule module"


class _Enough(BaseException):
    """Raised inside a forward once every product has been seen: the rest of it would be wasted."""


class Collector:
    """Statistics of the inputs of `wanted` parameters, shared between products that read the same tensor."""

    def __init__(self, wanted: dict[str, nn.Parameter], kinds: frozenset[str]) -> None:
        self._wanted = wanted
        self._kinds = kinds
        self._seen: list[tuple[Product, InputKey]] = []
        self.muted = False  # what is seen meanwhile does not count
        self._enough: int | None = None
        self.stats: dict[str, Stats] = {}
        self.transposed: dict[str, bool] = {}

    def run(self, module: nn.Module, calls: Iterable[Call], *, all_experts: bool = False) -> None:
        """Call `module` on every captured `(args, kwargs)`; outputs are dropped."""
        # held by no attribute: a cycle would keep the weights of a finished layer until the next collection
        observe = Observe(self._wanted, self._see)
        blocks = [block for _, block in expert_blocks(module)]
        for number, (args, kwargs) in enumerate(calls):
            given = [(one, one._version) for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
            with contextlib.suppress(_Enough), observe, _every_token_to_every_expert(self, blocks, all_experts):
                module(*args, **kwargs)
            if any(one._version != version for one, version in given):
                raise RunError(f"{type(module).__name__} changes its own input {IN_PLACE}")
            if not blocks:
                # the first batch tells how many products there are; later ones stop at the last
                self._enough = len(self._seen)
            self._accumulate(number)

    def add(self, product: Product, batch: int) -> None:
        """Take in one product that was seen elsewhere."""
        self._see([product])
        self._accumulate(batch)

    def _see(self, products: list[Product]) -> None:
        if self.muted:
            return
        self._seen.extend((one, input_key(one.x_TI)) for one in products)
        if len(self._seen) == self._enough:
            raise _Enough

    def _accumulate(self, batch: int) -> None:
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
            stats = self._shared(names, inputs[names[0]][0].x_TI)
            if id(stats) in updated:
                raise RunError(f"{names[0]} shares its input in one batch and not in another; exclude it")
            updated.add(id(stats))
            for product in inputs[names[0]]:
                stats.update(product.x_TI)
                if not bool(torch.isfinite(stats.square_sums_I).all()):
                    self._check_weights()
                    raise RunError(_not_finite(product.x_TI, product.name, batch))
        self._seen.clear()

    def _check_weights(self) -> None:
        """Where an input is not finite, a matrix before it may be the cause; raises RunError if so."""
        for name, parameter in self._wanted.items():
            if not bool(torch.isfinite(parameter).all()):
                raise RunError(f"{name} holds NaN or infinity; the checkpoint is damaged: download it again")

    def _shared(self, names: list[str], x_TI: torch.Tensor) -> Stats:
        known = {id(self.stats[name]) for name in names if name in self.stats}
        if len(known) > 1:
            raise RunError(f"{', '.join(names)} share an input in one batch and not in another; exclude one of them")
        stats = next((self.stats[name] for name in names if name in self.stats), None)
        stats = stats or Stats(x_TI.shape[1], self._kinds, x_TI.device)
        for name in names:
            self.stats[name] = stats
        return stats


def _not_finite(x_TI: torch.Tensor, name: str, batch: int) -> str:
    """What to say of an input whose statistics are not finite."""
    bad = int((~torch.isfinite(x_TI)).any(1).sum())
    what = f"NaN or infinity for {bad} of {len(x_TI)} tokens" if bad else "values whose squares overflow float32"
    return (
        f"the input of {name} holds {what} in calibration batch {batch}; "
        "the checkpoint may be damaged, or the dtype too narrow: try --dtype float32"
    )


@contextlib.contextmanager
def _every_token_to_every_expert(collector: Collector, blocks: list[nn.Module], wanted: bool) -> Iterator[None]:
    """While active, expert blocks first process all tokens with each expert, for the statistics alone."""
    if not wanted:
        yield
        return
    replaying = False

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal replaying
        if replaying:
            return
        fused = next((one for one in block.parameters(recurse=False) if one.dim() == 3), None)
        if fused is None:
            raise RunError(f"calibration.all_experts: {type(block).__name__} does not fuse its experts; leave it off")
        replaying = True
        for expert in range(len(fused)):
            block(
                *(_to_one_expert(one, args, kwargs, expert) for one in args),
                **{key: _to_one_expert(one, args, kwargs, expert) for key, one in kwargs.items()},
            )
        replaying = False
        collector.muted = True

    def after(block: nn.Module, args: Any, output: Any) -> None:
        if not replaying:
            collector.muted = False

    with contextlib.ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(after).remove)
        yield


def _to_one_expert(value: Any, args: tuple[Any, ...], kwargs: dict[str, Any], expert: int) -> Any:
    """Replace the routing of an expert block's call: the chosen experts become `expert`, their weights 1."""
    routing = next((one for one in (*args, *kwargs.values()) if _is_index(one)), None)
    if routing is None:
        raise RunError("calibration.all_experts: this model's expert block takes no expert index, so it cannot be had")
    if value is routing:
        return torch.full_like(routing[:, :1], expert)
    if isinstance(value, torch.Tensor) and value.shape == routing.shape:
        return torch.ones_like(value[:, :1])
    return value


def _is_index(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 2 and not value.is_floating_point()
