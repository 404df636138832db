"""The stack of decoder layers taken apart: each layer as a function of the hidden state.

One forward in which the layers do nothing tells what every layer is called with besides the hidden
state (masks, rotary tables) and what enters the first. From then on layers run one at a time, on any
state, in any order: skipped, repeated, or for many variants of the model while their weights are loaded.
The rest of the model (norm, head) is again its own forward, with the layers doing nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from llmprune.arch.discover import Unit
from llmprune.engine.suspend import first_tensor
from llmprune.types import RunError, UserError
from llmprune.weights import Loads

# The hidden states of a variant of the model, one tensor (sequences x tokens x width) a batch.
States = list[torch.Tensor]
Call = tuple[tuple[Any, ...], dict[str, Any]]


_NOT_ALONE = (
    "the layers of {} cannot be run one at a time: what one hands to the next is more than the hidden state ({}); weights "
    "of it can be pruned"
)


class _Enough(BaseException):
    """Raised in the last layer: what comes after it is not wanted."""


class Trunk:
    """A model on calibration `batches` (keyword arguments of its forward), layer by layer.

    `runs` counts how often a layer ran on all batches: the cost of a method in units of work. `tell` is called with the
    number of a layer that is loaded, and how many there are.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        units: list[Unit],
        batches: list[dict[str, torch.Tensor]],
        weights: Loads,
        tell: Callable[[int, int], None] | None = None,
    ) -> None:
        self.model, self.units, self.batches = model, units, batches
        self._weights, self._tell = weights, tell
        self._calls: list[list[Call]] = []
        # what layers of this class return beside the hidden state: None if that stands alone, else how many things
        self._beside: int | None = None
        self.runs = 0

    @property
    def depth(self) -> int:
        return len(self.units)

    def first(self, sequences: int) -> Trunk:
        """The same model on the first sequences only."""
        batches: list[dict[str, torch.Tensor]] = []
        for batch in self.batches:
            if sequences > 0:
                batches.append({key: one[:sequences] for key, one in batch.items()})
                sequences -= len(batch["input_ids"])
        return self._on(batches)

    def rows(self) -> Trunk:
        """The same model on the same text, one sequence a batch."""
        batches = [
            {key: one[row : row + 1] for key, one in batch.items()}
            for batch in self.batches
            for row in range(len(batch["input_ids"]))
        ]
        return self._on(batches)

    def split(self, size: int) -> list[Trunk]:
        """The same model on `size` batches after another."""
        some = (self.batches[start : start + size] for start in range(0, len(self.batches), size))
        return [self._on(batches) for batches in some]

    def _on(self, batches: list[dict[str, torch.Tensor]]) -> Trunk:
        """The same model on other batches."""
        return Trunk(self.model, self.units, batches, self._weights, self._tell)

    def enter(self) -> States:
        """What enters the first layer, for every batch."""
        self._calls = []
        states = []
        for number in range(len(self.batches)):
            calls = self._called(number, probe=number == 0)
            if number == 0:
                self._check_alone(calls, self._called(number, shift=1.0))
            states.append(_hidden(*calls[0]))
            self._calls.append([_without_hidden(*call) for call in calls])
        return states

    def entering(self, batch: int) -> torch.Tensor:
        """What enters the first layer, for one batch, when all have entered once; with its graph if there is one."""
        return _hidden(*self._called(batch)[0])

    @contextlib.contextmanager
    def loaded(self, *layers: int) -> Iterator[None]:
        """While active, the weights of some layers are usable."""
        for index in layers:
            self._weights.load(self.units[index])
            if self._tell is not None:
                self._tell(index, self.depth)
        try:
            yield
        finally:
            for index in layers:
                self._weights.free(self.units[index])

    def outside(self, names: Iterable[str]) -> dict[str, nn.Parameter]:
        """Parameters beside the layers, usable until a layer is loaded."""
        wanted = list(names)
        self._weights.fetch(wanted)
        return {name: self.model.get_parameter(name) for name in wanted}

    def run(self, index: int, states: States, *, batches: range | None = None) -> States:
        """Layer `index` on the hidden states of all (or some) batches; its weights must be loaded."""
        numbers = range(len(states)) if batches is None else batches
        self.runs += batches is None
        return [self.apply(index, number, state) for number, state in zip(numbers, states, strict=True)]

    def call(self, index: int, batch: int, state: torch.Tensor) -> Call:
        """The arguments with which layer `index` is called on a state that belongs to `batch`."""
        return _with_hidden(*self._calls[batch][index], state)

    def apply(self, index: int, batch: int, state: torch.Tensor) -> torch.Tensor:
        """Layer `index` on one state that belongs to `batch`."""
        args, kwargs = self.call(index, batch, state)
        version = state._version
        with self._one_at_a_time():
            output = self.units[index].module(*args, **kwargs)
        if state._version != version:
            raise RunError(f"{self.units[index].name} changes its own input in place, so variants cannot share it")
        return first_tensor(output)

    @contextlib.contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Refuse a model whose code fails when its layers are run by themselves."""
        try:
            yield
        except (AttributeError, TypeError, ValueError, IndexError, KeyError) as error:
            why = str(error).strip() or type(error).__name__
            raise UserError(_NOT_ALONE.format(type(self.model).__name__, why)) from error

    def walk(self, states: States) -> Iterator[tuple[int, States]]:
        """Run through all layers, yielding each index and its outputs, with its weights still loaded."""
        for index in range(self.depth):
            with self.loaded(index):
                states = self.run(index, states)
                yield index, states

    def logits(self, batch: int, state: torch.Tensor) -> torch.Tensor:
        """The model's logits (sequences x tokens x vocabulary) if `state` leaves the last layer."""
        with self._bypassed([], state):
            logits: torch.Tensor = self.model(**self.batches[batch], use_cache=False).logits
        return logits

    def losses(self, states: States) -> list[float]:
        """The negative log likelihood of the next token, summed over the tokens of each batch."""
        return [
            float(token_losses(self.logits(number, state), self.batches[number]["input_ids"]).double().sum())
            for number, state in enumerate(states)
        ]

    def scored(self) -> int:
        """How many tokens have a loss: all but the first of every sequence."""
        return sum(batch["input_ids"][:, 1:].numel() for batch in self.batches)

    def _called(self, number: int, *, probe: bool = False, shift: float = 0.0) -> list[Call]:
        """The arguments of every layer, for one batch; `shift`: what each adds to the hidden state."""
        calls: list[Call] = []
        bypassed = self._bypassed(calls, None, probe=probe, shift=shift)
        with contextlib.suppress(_Enough), bypassed, self._one_at_a_time():
            self.model(**self.batches[number], use_cache=False)
        return calls

    def _check_alone(self, calls: list[Call], others: list[Call]) -> None:
        """Refuse a model that calls its layers with more that depends on what the layers before put out."""
        for unit, one, other in zip(self.units, calls, others, strict=True):
            pairs = zip(*(tree_leaves(_without_hidden(*call)) for call in (one, other)), strict=True)
            if not all(torch.equal(*pair) for pair in pairs if isinstance(pair[0], torch.Tensor)):
                raise UserError(
                    _NOT_ALONE.format(type(self.model).__name__, f"{unit.name} is given what others put out")
                )

    @contextlib.contextmanager
    def _bypassed(
        self, calls: list[Call], result: torch.Tensor | None, *, probe: bool = False, shift: float = 0.0
    ) -> Iterator[None]:
        """While active, layers return what they get, plus `shift`, and the last one `result` (or ends the forward).

        `calls` receives the arguments of every layer. `probe`: layer 0 really runs once, to see whether
        the layers of this class return tuples, and how long ones.
        """

        def answer(hidden: torch.Tensor) -> Any:
            return hidden if self._beside is None else (hidden, *[None] * self._beside)

        def bypass(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                calls.append((args, kwargs))
                if index == self.depth - 1:
                    if result is None:
                        raise _Enough
                    return answer(result)
                hidden = _hidden(args, kwargs)
                return answer(hidden + shift if shift else hidden)

            return forward

        def first(*args: Any, **kwargs: Any) -> Any:
            del layers[0].forward
            with self.loaded(0):
                output = layers[0](*args, **kwargs)
            self._beside = len(output) - 1 if isinstance(output, tuple | list) else None
            layers[0].forward = bypass(0)
            return layers[0].forward(*args, **kwargs)

        layers: list[Any] = [unit.module for unit in self.units]
        for index, layer in enumerate(layers):
            layer.forward = first if probe and index == 0 else bypass(index)
        try:
            yield
        finally:
            for layer in layers:
                vars(layer).pop("forward", None)


def token_losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Negative log likelihood of every token but the first, sequences x (tokens - 1), at least in float32."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


@contextlib.contextmanager
def silenced(modules: list[nn.Module]) -> Iterator[None]:
    """While active, these modules put out zeros, as if their weights and biases were zero."""

    def zero(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(zero).remove)
        yield


@contextlib.contextmanager
def holding(module: nn.Module, values: dict[str, torch.Tensor]) -> Iterator[dict[str, nn.Parameter]]:
    """While active, parameters of a module have other values (or it has parameters that it lacks); yields them."""
    before = dict(module.named_parameters())
    held = {name: nn.Parameter(value.clone(), requires_grad=False) for name, value in values.items()}
    _put(module, held)
    try:
        yield held
    finally:
        _put(module, {name: before.get(name) for name in held})


def _put(module: nn.Module, values: Mapping[str, nn.Parameter | None]) -> None:
    for name, value in values.items():
        owner, _, short = name.rpartition(".")
        module.get_submodule(owner)._parameters[short] = value


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _without_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    if args:
        return (None, *args[1:]), kwargs
    return (), {**kwargs, "hidden_states": None}


def _with_hidden(args: tuple[Any, ...], kwargs: dict[str, Any], state: torch.Tensor) -> Call:
    return ((state, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": state})
