"""The two orders in which statistics, solving and the forward pass follow each other.

`layer`: all products of a layer are measured with its dense weights on pruned inputs, the layer is
solved, and the forward goes on through the pruned layer. Two passes, one layer in memory.
`module`: the forward stops at each product; it is solved on exactly the input that it will see, and
the same pass goes on through it. One pass; the inner activations of a layer are held for all batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import nn

from llmprune.arch.discover import Unit, expert_blocks
from llmprune.engine.collect import Collector
from llmprune.engine.dense import DenseStream, Inputs
from llmprune.engine.observe import InputKey, Observe, Product, input_key
from llmprune.engine.suspend import DONE, Stop, Suspended
from llmprune.statistics import DRIFT, Stats
from llmprune.types import RunError

SCHEDULES = ("layer", "module")


class Work(Protocol):
    """What the engine calls back: the pipeline's side of a run."""

    kinds: frozenset[str]
    all_experts: bool

    def enter(self, unit: Unit) -> None:
        """The batches stand before `unit`: its weights must be there when this returns."""

    def enter_dense(self, unit: Unit) -> None:
        """As `enter`, but with the dense weights, even if the unit is finished."""

    def wanted(self, unit: Unit) -> set[str]:
        """Names of the matrices of `unit` that are still to be solved."""

    def solve(self, unit: Unit, stats: dict[str, Stats], transposed: dict[str, bool]) -> None:
        """Prune the matrices whose statistics are given; uses the dict up."""

    def finish(self, unit: Unit) -> None:
        """Nothing more will be measured in `unit`."""

    def leave(self, unit: Unit) -> None:
        """All batches have passed `unit`: its weights may go."""

    def complete(self) -> bool:
        """Whether every unit is finished, so that the forward need not go on."""


def run(model: nn.Module, units: list[Unit], batches: list[Any], schedule: str, work: Work) -> None:
    """Drive `batches` (keyword arguments of the model) through the model, calling `work` at every unit."""

    def forwards() -> Suspended:
        return Suspended(lambda batch: model(**batch, use_cache=False), batches)

    step = _by_layer if schedule == "layer" else _by_module
    with contextlib.ExitStack() as stack:
        suspended = stack.enter_context(forwards())
        dense = DenseStream(stack.enter_context(forwards())) if DRIFT in work.kinds else None
        stack.enter_context(_stops_at(units, suspended))
        if dense is not None:
            dense.start()
        step({unit.name: unit for unit in units}, suspended, dense, work)
    if not work.complete():
        missed = [unit.name for unit in units if work.wanted(unit)]
        raise RunError(f"the forward pass never reached {', '.join(missed) or 'some layers'}")


def _enter(unit: Unit, dense: DenseStream | None, work: Work) -> list[Inputs] | None:
    """Bring the weights of `unit` in; first let the dense stream pass, if there is one."""
    inputs = None
    if dense is not None:
        work.enter_dense(unit)
        inputs = dense.through(unit, _parameters(unit, work.wanted(unit)))
    work.enter(unit)
    return inputs


def _by_layer(units: dict[str, Unit], suspended: Suspended, dense: DenseStream | None, work: Work) -> None:
    suspended.start()
    while (stop := suspended.place()) is not DONE:
        unit = units[stop.name]
        if stop.kind == "unit":
            inputs = _enter(unit, dense, work)
            if work.wanted(unit):
                _measure_and_solve(unit, unit.module, work.wanted(unit), suspended, inputs, work)
            work.finish(unit)
        if work.complete():
            return
        suspended.advance()
        if stop.kind == "unit":
            work.leave(unit)


def _by_module(units: dict[str, Unit], suspended: Suspended, dense: DenseStream | None, work: Work) -> None:
    """As `_by_layer`, with stops at the products and expert blocks inside the current unit."""
    current: Unit | None = None
    inputs: list[Inputs] | None = None
    inside_blocks: set[str] = set()

    def see(products: list[Product]) -> None:
        if current is None or not suspended.inside():
            return
        for product in products:
            if product.parameter not in inside_blocks and product.name in work.wanted(current):
                # a mode is off inside its own handler; on again, every coroutine finds the same stack
                with observe:
                    suspended.pause(Stop("product", product.name, product))

    observe = Observe({}, see)
    last: Solved | None = None
    # forwards end inside the mode in which they were suspended
    with observe, contextlib.closing(suspended), contextlib.ExitStack() as blocks:
        suspended.start()
        while (stop := suspended.place()) is not DONE:
            if stop.kind in ("unit", "end"):
                if current is not None:
                    work.finish(current)
                    work.leave(current)
                    blocks.close()
                if work.complete():
                    return
                # while there is no current unit, the dense stream is not stopped at its products
                current = None
                if stop.kind == "unit":
                    inputs = _enter(units[stop.name], dense, work)
                    current = units[stop.name]
                    observe.watch(_parameters(current, work.wanted(current)))
                    inside_blocks = _stop_at_blocks(current, suspended, blocks)
                last = None
            elif stop.kind == "block":
                assert current is not None
                block = current.module.get_submodule(stop.name)
                wanted = {
                    name
                    for name in work.wanted(current)
                    if name.partition("[")[0].startswith(f"{current.prefix}{stop.name}.")
                }
                _measure_and_solve(current, block, wanted, suspended, inputs, work)
            else:
                assert current is not None
                last = _solve_product(current, stop.name, suspended, inputs, work, last)
            if current is not None and not work.wanted(current):
                work.finish(current)
                if work.complete():
                    return
            suspended.advance()


def _measure_and_solve(
    unit: Unit, module: nn.Module, wanted: set[str], suspended: Suspended, inputs: list[Inputs] | None, work: Work
) -> None:
    """Run `module` of `unit` on what the batches hold before it, and solve the `wanted` matrices in it."""
    collector = Collector(_parameters(unit, wanted), work.kinds)
    collector.run(module, suspended.payloads(), all_experts=work.all_experts, dense=inputs)
    work.solve(unit, collector.stats, collector.transposed)


# A collector, and the products that it took in with the keys that their inputs had.
Solved = tuple[Collector, list[Product], list[InputKey]]


def _solve_product(
    unit: Unit, name: str, suspended: Suspended, inputs: list[Inputs] | None, work: Work, last: Solved | None
) -> Solved:
    """Solve one product; if it reads the very tensors that the last one read, with the last one's statistics."""
    products: list[Product] = list(suspended.payloads())
    keys = [input_key(product.x_TI) for product in products]
    if last is not None and keys == last[2]:
        stats = next(iter(last[0].stats.values()))
        last[0].stats[name] = stats
        collector = last[0]
    else:
        collector = Collector({}, work.kinds)
        for number, product in enumerate(products):
            collector.add(product, number, inputs[number] if inputs is not None else None)
    work.solve(unit, {name: collector.stats[name]}, {name: products[0].transposed})
    return collector, products, keys


def _parameter(unit: Unit, name: str) -> nn.Parameter:
    return unit.module.get_parameter(name.removeprefix(unit.prefix))


def _parameters(unit: Unit, matrices: set[str]) -> dict[str, nn.Parameter]:
    return {s.parameter: _parameter(unit, s.parameter) for s in unit.matrices if s.name in matrices}


@contextlib.contextmanager
def _stops_at(units: list[Unit], suspended: Suspended) -> Iterator[None]:
    """Suspend forwards at the entrance of every unit, and at the exit of the last."""

    def entrance(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if suspended.inside():
                suspended.pause(Stop("unit", name, (args, kwargs)))

        return hook

    def exit_of_last(module: nn.Module, args: Any, output: Any) -> None:
        if suspended.inside():
            suspended.pause(Stop("end", units[-1].name))

    with contextlib.ExitStack() as stack:
        for unit in units:
            handle = unit.module.register_forward_pre_hook(entrance(unit.name), with_kwargs=True)
            stack.callback(handle.remove)
        stack.callback(units[-1].module.register_forward_hook(exit_of_last).remove)
        yield


def _stop_at_blocks(unit: Unit, suspended: Suspended, stack: contextlib.ExitStack) -> set[str]:
    """Suspend forwards at the expert blocks of `unit`; returns the parameters inside them."""
    inside: set[str] = set()
    for path, block in expert_blocks(unit.module):

        def hook(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            if suspended.inside():
                suspended.pause(Stop("block", path, (args, kwargs)))

        stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
        inside.update(f"{unit.prefix}{path}.{name}" for name, _ in block.named_parameters())
    return inside
