"""Where the weights of a unit come from and go to: streamed from a checkpoint, or resident in a model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from llmprune.arch.discover import Unit
from llmprune.checkpoint.output import Output
from llmprune.checkpoint.skeleton import Routing
from llmprune.checkpoint.source import Checkpoint
from llmprune.types import MatrixSpec, RunError, UserError

REST = "rest"


class Loads(Protocol):
    """Whatever brings in a model's weights, a unit at a time."""

    def load(self, unit: Unit, *, dense: bool = False) -> None:
        """Make the parameters of `unit` usable: the finished ones if there are, unless the `dense` are asked for."""

    def free(self, unit: Unit) -> None:
        """The parameters of `unit` are not needed for now."""

    def fetch(self, parameters: Iterable[str]) -> None:
        """Make parameters outside the units usable, until a unit is loaded."""


class Weights(Loads, Protocol):
    """Access to a model's weights, a unit at a time, to read and to change them."""

    def storage_dtype(self, parameter: str) -> torch.dtype:
        """The dtype in which a parameter is stored, whatever it is computed in."""

    def places(self, unit: Unit, parameter: str) -> list[torch.Tensor]:
        """Where the values of a loaded parameter lie: as forwards see them and, where that rounds, as they are stored.

        The last is the exact one. Who changes a parameter changes it in all places.
        """

    def done(self) -> set[str]:
        """Names of the units that an earlier run finished."""

    def commit(self, unit: Unit, record: dict[str, Any]) -> None:
        """`unit` has its final weights."""


class Resident:
    """A model that the caller loaded: it is pruned where it lies.

    What one of `units` lends to others is kept as it was, for when these are wanted dense.
    """

    def __init__(self, model: PreTrainedModel, units: Iterable[Unit] = ()) -> None:
        self._model = model
        self.records: dict[str, dict[str, Any]] = {}
        lent = {source for unit in units for source in unit.borrowed.values()}
        self._aside = {name: model.get_parameter(name).detach().clone() for name in lent}
        self._dense = False  # whether what is aside is not the dense values but the others

    def load(self, unit: Unit, *, dense: bool = False) -> None:
        if dense == self._dense:
            return
        for name, aside in self._aside.items():
            place = self._model.get_parameter(name).data
            held = place.clone()
            place.copy_(aside)
            aside.copy_(held)
        self._dense = dense

    def free(self, unit: Unit) -> None:
        pass

    def fetch(self, parameters: Iterable[str]) -> None:
        pass

    def storage_dtype(self, parameter: str) -> torch.dtype:
        dtype: torch.dtype = self._model.get_parameter(parameter).dtype
        return dtype

    def places(self, unit: Unit, parameter: str) -> list[torch.Tensor]:
        return [_parameter(unit, parameter).data]

    def done(self) -> set[str]:
        return set()

    def commit(self, unit: Unit, record: dict[str, Any]) -> None:
        self.records[unit.name] = record


class Streamed:
    """A checkpoint of any size: one unit in memory at a time, written out as it is done.

    Modules outside the units (embeddings, norms) are loaded when the forward first calls them. `parent`: where the dense
    weights of units lie, if not in the checkpoint. `prepare` is called with every unit that is loaded as it was, and may
    change it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        checkpoint: Checkpoint,
        output: Output | None,
        units: list[Unit],
        dtype: torch.dtype,
        device: torch.device,
        *,
        parent: Checkpoint | None = None,
    ) -> None:
        self._model, self._checkpoint, self._output = model, checkpoint, output
        self._parent = parent
        self.prepare: Callable[[Unit], None] = lambda unit: None
        self._routing = Routing(model, checkpoint)
        self._dtype, self._device = dtype, device
        # of the loaded units: parameters that `dtype` would round, by name, in float32 on the CPU
        self._exact: dict[str, torch.Tensor] = {}
        self._units = units
        self._prefixes = [unit.prefix for unit in units]
        self._loaded: set[str] = set()
        missing = self._routing.missing()
        if missing:
            raise UserError(f"{checkpoint.folder} lacks the tensor {missing[0]} that its configuration calls for")
        misfits = self._routing.misfits()
        if misfits:
            raise UserError(f"{checkpoint.folder} does not fit its configuration: {misfits[0]} has another shape")
        self._check_tied()
        for buffer_owner in model.modules():
            for name, buffer in buffer_owner.named_buffers(recurse=False):
                buffer_owner._buffers[name] = buffer.to(device)

    @property
    def unused(self) -> list[str]:
        """Tensors of the checkpoint that the model does not use; they are carried over as they are."""
        return self._routing.unused

    def load(self, unit: Unit, *, dense: bool = False) -> None:
        # all batches stand before `unit`: what they needed outside the units may go
        self._free_rest()
        self._forget(unit)
        overlay = self._overlay(unit, dense=dense)
        fresh = dense or unit.name not in self.done()
        rounded = self._rounded(unit) if fresh else []
        if rounded:
            computed = self._load_exact(unit, overlay)
        else:
            self._routing.load(self._routing.keys_under(unit.prefix), self._dtype, self._device, overlay)
        self._borrow(unit, dense=dense)
        self._loaded.add(unit.name)
        if fresh:
            self.prepare(unit)
        if rounded:
            self._exact.update({name: _parameter(unit, name).data for name in rounded})
            _recast(unit.module, self._device, computed)

    def free(self, unit: Unit) -> None:
        _to_meta(unit.module)
        self._forget(unit)
        self._loaded.discard(unit.name)
        self._checkpoint.close()

    def fetch(self, parameters: Iterable[str]) -> None:
        wanted = list(parameters)
        # a twin comes last: it replaces the parameter, and is tied to what it put there
        twins = [name for name, source in self._model.all_tied_weights_keys.items() if source in wanted]
        for name in (*wanted, *twins):
            owner = name.rpartition(".")[0]
            self._load_own(owner, self._model.get_submodule(owner))

    def storage_dtype(self, parameter: str) -> torch.dtype:
        return self._checkpoint.entries[self._routing.group_of(parameter).keys[0]].dtype

    def places(self, unit: Unit, parameter: str) -> list[torch.Tensor]:
        exact = self._exact.get(parameter)
        return [_parameter(unit, parameter).data, *([] if exact is None else [exact])]

    def done(self) -> set[str]:
        return set(self._output.records) if self._output else set()

    def commit(self, unit: Unit, record: dict[str, Any]) -> None:
        assert self._output is not None
        place = (2 + self._prefixes.index(unit.prefix), 1 + len(self._prefixes))
        found = self._routing.store(unit.prefix, self._in_full)
        self._output.write(unit.name, place, {key: self._as_stored(key, one) for key, one in found.items()}, record)

    @property
    def records(self) -> dict[str, dict[str, Any]]:
        """What was recorded of every finished unit, by an earlier run or this one."""
        return self._output.records if self._output else {}

    @property
    def routing(self) -> Routing:
        """Which tensor of the checkpoint feeds which parameter."""
        return self._routing

    def stored(self, unit: Unit, replaced: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The checkpoint tensors of a unit in their stored dtype, some of its parameters with other values."""
        if not replaced:
            return {key: self._checkpoint.tensor(key) for key in self._routing.keys_under(unit.prefix)}
        return self.edited(unit, lambda name, value: replaced[name].to(value) if name in replaced else value)

    def edited(self, unit: Unit, edit: Callable[[str, torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        """The checkpoint tensors of a unit in their stored dtype, its parameters changed, or cut, by `edit(name, value)`."""
        computed = self._load_exact(unit, None)
        tensors = self._routing.store(unit.prefix, edit)
        _recast(unit.module, torch.device("meta"), computed)
        self.free(unit)
        return {key: one.to(self._checkpoint.entries[key].dtype) for key, one in tensors.items()}

    def _load_exact(self, unit: Unit, overlay: Checkpoint | None) -> dict[str, torch.dtype]:
        """Load a unit on the CPU in float32, which every stored dtype fits; returns the dtypes that forwards need."""
        computed = {
            name: one.dtype
            for name, one in unit.module.named_parameters()
            if one.dtype.is_floating_point and unit.prefix + name not in unit.borrowed
        }
        # the loader keeps to the dtype of the parameter that it fills
        _recast(unit.module, torch.device("meta"), dict.fromkeys(computed, torch.float32))
        self._routing.load(self._routing.keys_under(unit.prefix), torch.float32, torch.device("cpu"), overlay)
        return computed

    def _rounded(self, unit: Unit) -> list[str]:
        """The parameters of a unit that are stored in more digits, or a wider range, than forwards have."""
        found = []
        for short, parameter in unit.module.named_parameters():
            name = unit.prefix + short
            if name in self._model.all_tied_weights_keys or not self.storage_dtype(name).is_floating_point:
                continue
            stored, own = torch.finfo(self.storage_dtype(name)), torch.finfo(parameter.dtype)
            if stored.eps < own.eps or stored.max > own.max:
                found.append(name)
        return found

    def _in_full(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """The exact value of a parameter, if it has one and was not changed where forwards see it alone."""
        exact = self._exact.get(name)
        return value if exact is None or not torch.equal(exact.to(value.dtype), value.cpu()) else exact

    def _forget(self, unit: Unit) -> None:
        self._exact = {name: one for name, one in self._exact.items() if not name.startswith(unit.prefix)}

    def commit_rest(self) -> None:
        """Write everything that lies outside the units, byte for byte as it was read."""
        assert self._output is not None
        inside = {key for prefix in self._prefixes for key in self._routing.keys_under(prefix)}
        rest = {key: self._checkpoint.tensor(key) for key in self._checkpoint.entries if key not in inside}
        self._output.write(REST, (1, 1 + len(self._prefixes)), rest, {})
        self._checkpoint.close()

    def _as_stored(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor in its stored dtype; one that did not change keeps its stored bytes."""
        source = self._checkpoint.tensor(key)
        if torch.equal(source.to(tensor.dtype), tensor.cpu()):
            return source
        return tensor.to("cpu", source.dtype)

    @contextlib.contextmanager
    def on_demand(self) -> Iterator[None]:
        """While active, a module outside the units gets its parameters when the forward calls it."""

        def arrive(module: nn.Module, args: tuple[Any, ...]) -> None:
            name = names[id(module)]
            if any(isinstance(one, torch.Tensor) and one.device.type == "meta" for one in args):
                # torch would go on with uninitialised memory
                raise RunError(
                    f"the model moves the input of {name} to weights that are not loaded yet; "
                    "load it with transformers and pass the loaded model"
                )
            if any(one.device.type == "meta" for one in module.parameters(recurse=False)):
                self._load_own(name, module)

        names = {id(module): name for name, module in self._model.named_modules() if not self._inside(name)}
        with contextlib.ExitStack() as stack:
            for name in names.values():
                module = self._model.get_submodule(name)
                if any(True for _ in module.parameters(recurse=False)):
                    stack.callback(module.register_forward_pre_hook(arrive).remove)
            # a forward may ask on which device the embedding lies before it calls it
            embedding = self._model.get_input_embeddings()
            stack.callback(self._model.register_forward_pre_hook(lambda *_: arrive(embedding, ())).remove)
            yield

    def _free_rest(self) -> None:
        """Drop the parameters outside the units; the forward fetches again what it needs again."""
        for name, module in self._model.named_modules():
            if not self._inside(name):
                _to_meta(module, recurse=False)

    def _overlay(self, unit: Unit, *, dense: bool) -> Checkpoint | None:
        """Where the tensors of a unit lie, if not in the checkpoint."""
        if dense or self._output is None:
            return self._parent if dense else None
        return self._output.written(unit.name) if unit.name in self.done() else None

    def _borrow(self, unit: Unit, *, dense: bool) -> None:
        """Give a unit the parameters that are those of other units, loaded for it where these are not."""
        for lender in self._units:
            lent = {name: source for name, source in unit.borrowed.items() if source.startswith(lender.prefix)}
            absent = lent and lender.name not in self._loaded
            if absent:
                keys = [key for source in lent.values() for key in self._routing.group_of(source).keys]
                self._routing.load(keys, self._dtype, self._device, self._overlay(lender, dense=dense))
            for name, source in lent.items():
                place, _, short = name.rpartition(".")
                self._model.get_submodule(place)._parameters[short] = self._model.get_parameter(source)
            if absent:
                _to_meta(lender.module)

    def _check_tied(self) -> None:
        """Raise UserError if the checkpoint stores tied parameters of units twice, with different values."""
        stored = self._routing.groups
        for name, source in ((name, one) for unit in self._units for name, one in unit.borrowed.items()):
            pairs = zip(stored[name].keys, stored[source].keys, strict=True) if name in stored else ()
            if not all(torch.equal(*map(self._checkpoint.tensor, pair)) for pair in pairs):
                raise UserError(
                    f"{self._checkpoint.folder} stores other values for {name} than for {source}, which its configuration "
                    "ties together; set tie_word_embeddings to false in its config.json"
                )

    def _inside(self, name: str) -> bool:
        return any(f"{name}.".startswith(prefix) for prefix in self._prefixes)

    def _load_own(self, name: str, module: nn.Module) -> None:
        """Load the parameters that `module` itself owns; a tied one comes by the name of its twin."""
        tied = self._model.all_tied_weights_keys
        for short, _ in list(module.named_parameters(recurse=False)):
            full = f"{name}.{short}" if name else short
            source = full if full in self._routing.groups else tied.get(full, full)
            self._routing.load(self._routing.groups[source].keys, self._dtype, self._device, None)
            if source != full:
                module._parameters[short] = self._model.get_parameter(source)


def read_matrix(weights: Weights, unit: Unit, spec: MatrixSpec) -> torch.Tensor:
    """The weights of a matrix, as exact as they are stored, as float32, outputs x inputs: a copy."""
    *_, exact = weights.places(unit, spec.parameter)
    laid_out = _part(exact, spec)
    device = _parameter(unit, spec.parameter).device
    return (laid_out.T if spec.transposed else laid_out).to(device, torch.float32, copy=True)


def write_matrix(weights: Weights, unit: Unit, spec: MatrixSpec, weight_OI: torch.Tensor) -> None:
    """Give a matrix of a loaded unit other weights."""
    for place in weights.places(unit, spec.parameter):
        _part(place, spec).copy_(weight_OI.T if spec.transposed else weight_OI)


def stored_matrix(unit: Unit, spec: MatrixSpec) -> torch.Tensor:
    """The matrix as it lies in its parameter, where forwards see it: a view."""
    return _part(_parameter(unit, spec.parameter).data, spec)


def _part(parameter: torch.Tensor, spec: MatrixSpec) -> torch.Tensor:
    return parameter if spec.index is None else parameter[spec.index]


def _parameter(unit: Unit, parameter: str) -> nn.Parameter:
    return unit.module.get_parameter(parameter.removeprefix(unit.prefix))


@contextlib.contextmanager
def swapped(unit: Unit, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """While active, matrices of a loaded unit have these values, by name and as their parameters hold them."""
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for spec in unit.matrices:
            if spec.name in values:
                place = stored_matrix(unit, spec)
                kept.append((place, place.clone()))
                place.copy_(values[spec.name])
        yield
    finally:
        for place, before in kept:
            place.copy_(before)


def _to_meta(module: nn.Module, *, recurse: bool = True) -> None:
    for owner in module.modules() if recurse else [module]:
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.device.type != "meta":
                owner._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def _recast(module: nn.Module, device: torch.device, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give parameters another dtype and device."""
    for name, dtype in dtypes.items():
        path, _, short = name.rpartition(".")
        value = module.get_parameter(name).to(device, dtype)
        module.get_submodule(path)._parameters[short] = nn.Parameter(value, requires_grad=False)
