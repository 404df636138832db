"""See every matrix product at the operator, and know which parameter it reads.

Hooks on nn.Linear miss GPT-2's Conv1D and all fused experts; a function mode that looks at the
operands of the few product operators misses nothing and names no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

_EITHER = {
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.mm,
    torch.Tensor.mm,
    torch.bmm,
    torch.Tensor.bmm,
}
_WEIGHT_THIRD = {
    torch.addmm,
    torch.Tensor.addmm,
    torch.baddbmm,
    torch.Tensor.baddbmm,
}


# Of what an operator returns (or of its gradient), the rows that are one product's: tokens x outputs.
Rows = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Product:
    """One observed matrix product: `weight` (slice `index`) was applied to `x_TI`; `rows` cuts out its outputs."""

    parameter: str
    index: int | None
    transposed: bool
    x_TI: torch.Tensor
    rows: Rows

    @property
    def name(self) -> str:
        return self.parameter if self.index is None else f"{self.parameter}[{self.index}]"


class Observe(TorchFunctionMode):
    """Calls `seen(products)` before each operator that multiplies by one of `parameters`.

    `made(products, returned)` is called after it, where it is given.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        seen: Callable[[list[Product]], None] | None = None,
        made: Callable[[list[Product], torch.Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self._seen, self._made = seen, made
        self.watch(parameters)

    def watch(self, parameters: dict[str, nn.Parameter]) -> None:
        """Look for these parameters from now on, in place of the former."""
        self._by_storage: dict[int, list[tuple[str, nn.Parameter]]] = {}
        for name, one in parameters.items():
            # parameters that were cut out of one tensor share its storage
            self._by_storage.setdefault(one.untyped_storage().data_ptr(), []).append((name, one))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = [one for operands in _operands(func, args, kwargs or {}) if (one := list(self._products(*operands)))]
        if self._seen is not None:
            for products in found:
                self._seen(products)
        returned = func(*args, **(kwargs or {}))
        if self._made is not None:
            for products in found:
                self._made(products, returned)
        return returned

    def _products(self, x: torch.Tensor, w_IO: torch.Tensor, turned: bool = False) -> Iterator[Product]:
        """Match the second operand, seen as inputs x outputs, against the parameters; `turned`: outputs come first."""
        rows = _turned_rows if turned else _rows
        for name, parameter in self._by_storage.get(w_IO.untyped_storage().data_ptr(), ()):
            transposed = _orientation(w_IO, parameter)
            offset = int(w_IO.storage_offset() - parameter.storage_offset())
            if transposed is None:
                continue
            if parameter.dim() == 2:
                if w_IO.dim() == 2 and offset == 0:
                    yield Product(name, None, transposed, _rows(x), rows)
                continue
            index, rest = divmod(offset, parameter.stride(0))
            if rest or not 0 <= index < len(parameter):
                continue
            if w_IO.dim() == 2:
                yield Product(name, index, transposed, _rows(x), rows)
            elif w_IO.stride(0) == parameter.stride(0):
                for place in range(len(w_IO)):
                    # a batched product gives every expert all tokens, the foreign ones zeroed: they do not count
                    x_TI = x[place]
                    own_T = x_TI.abs().amax(-1) > 0
                    yield Product(name, index + place, transposed, x_TI[own_T], _expert_rows(rows, place, own_T))


def _rows(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1, values.shape[-1])


def _turned_rows(values: torch.Tensor) -> torch.Tensor:
    return _rows(values.mT)


def _expert_rows(rows: Rows, place: int, own_T: torch.Tensor) -> Rows:
    return lambda values: rows(values[place])[own_T]


def _orientation(w_IO: torch.Tensor, parameter: nn.Parameter) -> bool | None:
    """Whether `parameter` stores inputs x outputs, if its matrices are laid out as `w_IO`; None if they are not."""
    shape, strides = parameter.shape[-2:], parameter.stride()[-2:]
    if w_IO.dim() > 1 and w_IO.shape[-2:] == shape[::-1] and w_IO.stride()[-2:] == strides[::-1]:
        return False
    if w_IO.dim() > 1 and w_IO.shape[-2:] == shape and w_IO.stride()[-2:] == strides:
        return True
    return None


def _operands(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[torch.Tensor, torch.Tensor] | tuple[torch.Tensor, torch.Tensor, bool]]:
    """What may be the data and the weight, as inputs x outputs, of a product operator; nothing for other functions.

    A third value is whether the operator returns outputs x tokens.
    """
    if func is F.linear:
        x, weight_OI = _pick(args, kwargs, ("input", "weight"))
        if weight_OI.dim() == 2:
            yield x, weight_OI.mT
    elif func in _EITHER:
        first, second = _pick(args, kwargs, ("input", "other" if "matmul" in func.__name__ else "mat2"))
        yield first, second
        if first.dim() > 1 and second.dim() > 1:
            yield second.mT, first.mT, True
    elif func in _WEIGHT_THIRD:
        batched = "baddbmm" in func.__name__
        yield _pick(args[1:], kwargs, ("batch1", "batch2") if batched else ("mat1", "mat2"))


def _pick(args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, str]) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names))
    return first, second


InputKey = tuple[int, ...]


def input_key(x_TI: torch.Tensor) -> InputKey:
    """Identity of an input while it is alive: two products with equal keys read the same values."""
    return (x_TI.data_ptr(), x_TI._version, *x_TI.shape, *x_TI.stride())
