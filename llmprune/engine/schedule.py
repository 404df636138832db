"""The two orders in which statistics, solving and the forward pass follow each other.

`layer`: all products of a layer are measured with its dense weights on pruned inputs, the layer is
solved, and the forward goes on through the pruned layer. Two passes, one layer in memory.
`module`: the forward stops at each product; it is solved on exactly the input that it will see, and
the same pass goes on through it. One pass; the inner activations of a layer are held for all batches.
A matrix that a layer uses several times cannot wait for its later inputs: it is measured and solved before the layer
runs, on all its uses, as `layer` would.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from llmprune.arch.discover import Unit, expert_blocks
from llmprune.arch.sublayers import writes_to_stream
from llmprune.engine.collect import Collector
from llmprune.engine.dense import DenseStream, Inputs
from llmprune.engine.observe import InputKey, Observe, Product, input_key
from llmprune.engine.residual import Residual, recorded, writers
from llmprune.engine.share import Share
from llmprune.engine.suspend import DONE, Calls, Stop, Suspended, first_tensor
from llmprune.statistics import DRIFT, Stats
from llmprune.types import RunError

USED_AGAIN = "of all uses of the matrix in its layer, before anything in the layer was pruned"


class Work(Protocol):
    """What the engine calls back: the pipeline's side of a run."""

    kinds: frozenset[str]
    all_experts: bool
    reconstructs: bool

    def enter(self, unit: Unit) -> None:
        """The batches stand before `unit`: its weights must be there when this returns."""

    def enter_dense(self, unit: Unit) -> None:
        """As `enter`, but with the dense weights, even if the unit is finished."""

    def wanted(self, unit: Unit) -> set[str]:
        """Names of the matrices of `unit` that are still to be solved."""

    def solve(self, unit: Unit, stats: dict[str, Stats], transposed: dict[str, bool]) -> None:
        """Prune the matrices whose statistics are given; uses the dict up."""

    def reconstruct(self, unit: Unit, calls: Calls, targets: list[torch.Tensor]) -> bool:
        """Fit the solved `unit`, whose calls and present outputs are given, to the dense model's outputs.

        Returns whether its weights may have changed, which those of a unit that was finished before never do.
        """

    def finish(self, unit: Unit) -> None:
        """Nothing more will be measured in `unit`."""

    def leave(self, unit: Unit) -> None:
        """All batches have passed `unit`: its weights may go."""

    def complete(self) -> bool:
        """Whether every unit is finished, so that the forward need not go on."""


def run(model: nn.Module, units: list[Unit], share: Share, schedule: str, work: Work) -> None:
    """Drive the batches of `share` through the model, calling `work` at every unit."""

    def forwards() -> Suspended:
        return Suspended(lambda batch: model(**batch, use_cache=False), share.batches)

    beside = DRIFT in work.kinds or work.reconstructs
    with contextlib.ExitStack() as stack:
        suspended = stack.enter_context(forwards())
        dense = DenseStream(stack.enter_context(forwards())) if beside else None
        stack.enter_context(_stops_at(units, suspended))
        if work.reconstructs:
            stack.enter_context(_stops_at_exits(units, suspended))
        _Course(units, suspended, dense, work, share, by_module=schedule == "module").run()
    if not work.complete():
        missed = [unit.name for unit in units if work.wanted(unit)]
        raise RunError(f"the forward pass never reached {', '.join(missed) or 'some layers'}")


class _Course:
    """The way of all batches through the model, and what is done at each of their stops."""

    def __init__(
        self,
        units: list[Unit],
        suspended: Suspended,
        dense: DenseStream | None,
        work: Work,
        share: Share,
        *,
        by_module: bool,
    ) -> None:
        self._units = {unit.name: unit for unit in units}
        self._suspended, self._dense, self._work, self._share = suspended, dense, work, share
        self._observe = Observe({}, self._see) if by_module else None
        self._hooks = contextlib.ExitStack()
        self._inside_blocks: set[str] = set()
        self._unit: Unit | None = None  # None while the dense stream moves, which no product may stop
        self._inputs: list[Inputs] | None = None
        self._residuals: list[Residual] = []
        self._last: Solved | None = None

    def run(self) -> None:
        """From start to end, or until every unit is finished."""
        # forwards end inside the mode in which they were suspended
        with self._observe or contextlib.nullcontext(), contextlib.closing(self._suspended), self._hooks:
            if self._dense is not None:
                self._dense.start()
            self._suspended.start()
            while (stop := self._suspended.place()) is not DONE:
                again = False
                if stop.kind in ("unit", "end"):
                    self._depart()
                    if stop.kind == "unit" and not self._work.complete():
                        self._arrive(self._units[stop.name])
                elif stop.kind == "exit":
                    again = self._fit()
                elif stop.kind == "block":
                    self._solve_block(stop.name)
                else:
                    self._solve_product(stop.name)
                if self._unit is not None and not self._work.reconstructs and not self._work.wanted(self._unit):
                    self._finish()
                if self._work.complete():
                    return
                self._suspended.advance(again=again)

    def _arrive(self, unit: Unit) -> None:
        """Bring the weights of `unit` in, after the dense stream has passed through them."""
        if self._dense is not None:
            self._work.enter_dense(unit)
            self._inputs = self._dense.through(unit, _parameters(unit, self._work.wanted(unit)))
        self._work.enter(unit)
        wanted = self._work.wanted(unit)
        self._unit, self._last = unit, None
        if self._observe is not None:
            self._observe.watch(_parameters(unit, wanted))
            self._inside_blocks = _stop_at_blocks(unit, self._suspended, self._hooks)
            again = self._used_again(unit, wanted)
            if again:
                self._measure_and_solve(unit.module, again, remark=USED_AGAIN)
            if self._inputs and self._inputs[0].residual is not None:
                self._record_residuals(unit)
        elif wanted:
            self._measure_and_solve(unit.module, wanted)
            if not self._work.reconstructs:
                self._finish()

    def _used_again(self, unit: Unit, wanted: set[str]) -> set[str]:
        """Which of the matrices the layer uses more than once, as a run of a copy of the first batch tells."""
        uses: Counter[str] = Counter()
        for args, kwargs in itertools.islice(self._suspended.payloads(), 1):
            # a layer may change its input in place
            its_args, its_kwargs = [_copied(one) for one in args], {key: _copied(one) for key, one in kwargs.items()}
            with Observe(_parameters(unit, wanted), lambda products: uses.update(one.name for one in products)):
                unit.module(*its_args, **its_kwargs)
        found = [
            name for name, count in uses.items() if count > 1 and name.partition("[")[0] not in self._inside_blocks
        ]
        return {name for one in self._share.ranks.gather(found) for name in one} & wanted

    def _record_residuals(self, unit: Unit) -> None:
        """From now on, take down what the batches add to the residual stream; each writer sees them in order."""
        self._residuals = [Residual.of(call) for call in self._suspended.payloads()]
        passed: dict[str, int] = {}

        def write(path: str, output: torch.Tensor) -> None:
            if self._suspended.inside():
                number = passed.get(path, 0)
                passed[path] = number + 1
                self._residuals[number].added[path] = output

        self._hooks.enter_context(recorded(unit.module, writers(unit.module), write))

    def _depart(self) -> None:
        """All batches have passed the current unit."""
        if self._unit is not None:
            self._finish()
            self._work.leave(self._unit)
            self._hooks.close()
        self._unit, self._inputs, self._residuals = None, None, []

    def _finish(self) -> None:
        assert self._unit is not None
        self._work.finish(self._unit)

    def _fit(self) -> bool:
        """At the exit of a unit: fit it to the dense outputs; whether it must be run again, with its new weights."""
        assert self._unit is not None
        if self._inputs is None:  # it has run again
            return False
        self._hooks.close()
        calls = [(call, first_tensor(output)) for call, output in self._suspended.payloads()]
        targets = [one.output for one in self._inputs if one.output is not None]
        if not self._work.reconstruct(self._unit, calls, targets):
            return False
        self._finish()
        self._inputs, self._residuals = None, []
        return True

    def _see(self, products: list[Product]) -> None:
        if self._unit is None or self._observe is None or not self._suspended.inside():
            return
        for product in products:
            if product.parameter not in self._inside_blocks and product.name in self._work.wanted(self._unit):
                # a mode is off inside its own handler; on again, every coroutine finds the same stack
                with self._observe:
                    self._suspended.pause(Stop("product", product.name, product))

    def _solve_block(self, path: str) -> None:
        """Within an expert block the batches' orders differ: it is run as a whole, for its first matrices and its last."""
        assert self._unit is not None
        prefix = f"{self._unit.prefix}{path}."
        wanted = {name for name in self._work.wanted(self._unit) if name.partition("[")[0].startswith(prefix)}
        block = self._unit.module.get_submodule(path)
        last = {name for name in wanted if writes_to_stream(name)}
        if wanted - last:
            self._measure_and_solve(block, wanted - last)
        if last:
            self._measure_and_solve(block, last, self._goals(path))

    def _measure_and_solve(
        self, module: nn.Module, wanted: set[str], goals: Sequence[torch.Tensor] = (), remark: str | None = None
    ) -> None:
        """Run `module` of the unit on what the batches hold before it, and solve the `wanted` matrices in it."""
        assert self._unit is not None
        stats, transposed = self._measure(self._unit, module, wanted, goals)
        for one in stats.values():
            one.remark = remark
        self._work.solve(self._unit, stats, transposed)

    def _measure(
        self, unit: Unit, module: nn.Module, wanted: set[str], goals: Sequence[torch.Tensor]
    ) -> tuple[dict[str, Stats], dict[str, bool]]:
        share, everything = self._share, _parameters(unit, {one.name for one in unit.matrices})
        collector = Collector(everything, self._work.kinds, wanted, ordered=share.ordered)
        collector.run(
            module,
            self._suspended.payloads(),
            all_experts=self._work.all_experts,
            dense=self._inputs,
            numbers=share.numbers,
            goals=goals,
        )
        return share.whole(collector, unit, wanted), collector.transposed

    def _goals(self, writer: str) -> list[torch.Tensor]:
        """What a writer would have to put out for each batch's residual stream to be the dense model's; or nothing."""
        return [
            dense.residual.after(writer) - pruned.before(writer)
            for dense, pruned in zip(self._inputs or (), self._residuals, strict=False)
            if dense.residual is not None and not self._work.all_experts
        ]

    def _lack(self, product: Product, batch: int) -> torch.Tensor | None:
        """How far the residual stream that a product writes to is behind that of the dense model."""
        assert self._unit is not None
        writer = product.parameter.removeprefix(self._unit.prefix).removesuffix(".weight")
        dense = self._inputs[batch].residual if self._inputs is not None else None
        if dense is None or writer not in dense.added:
            return None
        return dense.before(writer) - self._residuals[batch].before(writer)

    def _solve_product(self, name: str) -> None:
        """Solve one product; if it reads the very tensors that the last one read, with the last one's statistics."""
        assert self._unit is not None
        products: list[Product] = list(self._suspended.payloads())
        keys = [input_key(product.x_TI) for product in products]
        if self._last is not None and keys == self._last[2]:
            stats = self._last[0]
        else:
            collector = Collector({}, self._work.kinds, ordered=self._share.ordered)
            for place, product in enumerate(products):
                beside = self._inputs[place] if self._inputs is not None else None
                collector.add(product, self._share.numbers[place], beside, self._lack(product, place))
            stats = self._share.whole(collector, self._unit, {name})[name]
        self._work.solve(self._unit, {name: stats}, {name: products[0].transposed})
        self._last = (stats, products, keys)


# Statistics, and the products that they are of with the keys that their inputs had.
Solved = tuple[Stats, list[Product], list[InputKey]]


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


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


@contextlib.contextmanager
def _stops_at_exits(units: list[Unit], suspended: Suspended) -> Iterator[None]:
    """Suspend forwards where they leave a unit, with its call and output; on demand they run through it again."""

    def repeating(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            while True:
                output = forward(*args, **kwargs)
                if not suspended.inside() or not suspended.pause(Stop("exit", name, ((args, kwargs), output))):
                    return output

        return run

    for unit in units:
        unit.module.forward = repeating(unit.name, unit.module.forward)
    try:
        yield
    finally:
        for unit in units:
            del unit.module.forward


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
