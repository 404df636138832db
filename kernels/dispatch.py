"""Which implementation of an operation runs: one table, and one rule for all operations.

The first implementation of a row that can run and is worth it runs; the last one, plain torch, always can.
`LLMPRUNE_KERNELS` overrides the rule: `torch` for every operation that has such an implementation, `gram=triton` for
one, several separated by commas. What is asked for and cannot run is an error, never another implementation.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch

from llmprune.kernels import eligibility
from llmprune.types import RunError, UserError

VARIABLE = "LLMPRUNE_KERNELS"


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    `function` ("module:name") is imported when it is first needed: triton is heavy and may be missing.
    The three rules are pure and answer None, or the reason against it: `machine(device)` whether this
    machine can run it at all, `fits(*operands)` whether it computes these operands, `pays(*operands)` whether
    it is expected to be the fastest; only the first two bind an explicit choice.
    """

    name: str
    function: str
    machine: Callable[[torch.device], str | None] = eligibility.always
    fits: Callable[..., str | None] = eligibility.always
    pays: Callable[..., str | None] = eligibility.always

    @functools.cached_property
    def run(self) -> Callable[..., Any]:
        module, _, name = self.function.partition(":")
        found: Callable[..., Any] = getattr(import_module(f"llmprune.kernels.{module}"), name)
        return found


def _triton(
    kernel: str,
    function: str,
    fits: Callable[..., str | None],
    sizes: Callable[..., dict[str, int]] = eligibility.any_size,
) -> Implementation:
    return Implementation("triton", function, eligibility.triton, fits, partial(eligibility.measured, kernel, sizes))


TABLE: dict[str, tuple[Implementation, ...]] = {
    "product": (
        Implementation(
            "onednn",
            "product:product_onednn",
            eligibility.onednn,
            eligibility.float32_matrices,
            eligibility.onednn_is_faster,
        ),
        Implementation("torch", "product:product_torch"),
    ),
    "gram_update": (
        _triton("gram_update", "gram_triton:gram_update_", eligibility.gram, eligibility.gram_sizes),
        Implementation("torch", "gram:gram_update_torch_"),
    ),
    "column_moments": (
        _triton("column_moments", "moments_triton:column_moments", eligibility.float_rows),
        Implementation("torch", "moments:column_moments_torch"),
    ),
    "sparsegpt_block": (
        _triton("sparsegpt_block", "sparsegpt_block_triton:solve_block", eligibility.sparsegpt_block),
        Implementation("torch", "sparsegpt_block:solve_block_torch"),
    ),
    "matmul24": (
        Implementation(
            "cusparselt",
            "sparse24:matmul24_cusparselt",
            eligibility.cusparselt,
            eligibility.prefill_cusparselt,
            eligibility.cusparselt_is_faster,
        ),
        Implementation(
            "gluon",
            "sparse24_gluon:matmul24",
            eligibility.mma_sp,
            eligibility.decode_mma_sp,
            partial(eligibility.measured, "matmul24_gluon", eligibility.product_sizes),
        ),
        _triton("matmul24", "sparse24_triton:matmul24", eligibility.matmul24, eligibility.product_sizes),
        Implementation("torch", "sparse24:matmul24_torch"),
    ),
    "matmul_bitmask": (
        _triton(
            "matmul_bitmask", "bitmask_triton:matmul_bitmask", eligibility.decode_bitmask, eligibility.bitmask_sizes
        ),
        Implementation("torch", "bitmask:matmul_bitmask_torch"),
    ),
    "matmul_overflow": (
        _triton("add_surplus", "overflow_triton:matmul_overflow", eligibility.decode_overflow),
        Implementation("torch", "overflow:matmul_overflow_torch"),
    ),
    "unpack24": (
        _triton("unpack24", "sparse24_triton:unpack24", eligibility.packed24),
        Implementation("torch", "sparse24:unpack24_torch"),
    ),
}


def choose(operation: str, *operands: Any) -> Implementation:
    """The implementation that computes `operation` on these operands, the first of which is a tensor.

    Raises RunError if `LLMPRUNE_KERNELS` asks for one that cannot.
    """
    asked = _asked(os.environ.get(VARIABLE, "")).get(operation)
    device = operands[0].device
    passed_over: dict[str, str] = {}
    for one in TABLE[operation]:
        if asked is not None and one.name != asked:
            continue
        reason = one.machine(device) or one.fits(*operands)
        if reason is not None and asked is not None:
            raise RunError(f"{VARIABLE} asks for {operation}={asked}, which cannot run: {reason}")
        reason = reason or (one.pays(*operands) if asked is None else None)
        if reason is None:
            _note(operation, one.name, passed_over)
            return one
        passed_over[one.name] = reason
    raise AssertionError(f"the last implementation of {operation} must always run")


def run(operation: str, *operands: Any) -> Any:
    """Compute `operation`."""
    return choose(operation, *operands).run(*operands)


def check_choice(device: torch.device) -> None:
    """Raise UserError if `LLMPRUNE_KERNELS` is not understood, or names what this machine cannot run."""
    for operation, name in _asked(os.environ.get(VARIABLE, "")).items():
        chosen = next(one for one in TABLE[operation] if one.name == name)
        reason = chosen.machine(device)
        if reason is not None:
            raise UserError(f"{VARIABLE} asks for {operation}={name}, which cannot run here: {reason}")


def fingerprint(device: torch.device) -> dict[str, str | None]:
    """What may change the bytes of a result: the choice by hand, and triton where it runs by itself."""
    triton = eligibility.triton_version() if device.type == "cuda" else None
    return {"asked": os.environ.get(VARIABLE), "triton": triton}


@functools.cache
def _asked(setting: str) -> dict[str, str]:
    """The implementation that a setting names, by operation."""
    asked = {}
    for part in filter(None, (part.strip() for part in setting.split(","))):
        operation, equals, name = part.rpartition("=")
        rows = [operation] if equals else list(TABLE)
        hit = [row for row in rows if name in {one.name for one in TABLE.get(row, ())}]
        if not hit:
            known = "; ".join(f"{row}: {', '.join(one.name for one in ways)}" for row, ways in TABLE.items())
            raise UserError(f"{VARIABLE}={setting!r}: {part!r} names no implementation; there are {known}")
        asked.update(dict.fromkeys(hit, name))
    return asked


# What ran, and why what stands before it in the table did not, for as long as somebody listens.
_listeners: list[dict[str, dict[str, Any]]] = []


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, dict[str, Any]]]:
    """Collect what ran: `{operation: {"ran": [names], "passed_over": {name: reason}}}`."""
    found: dict[str, dict[str, Any]] = {}
    _listeners.append(found)
    try:
        yield found
    finally:
        _listeners[:] = [one for one in _listeners if one is not found]


def _note(operation: str, name: str, passed_over: dict[str, str]) -> None:
    for found in _listeners:
        row = found.setdefault(operation, {"ran": [], "passed_over": {}})
        if name not in row["ran"]:
            row["ran"].append(name)
        row["passed_over"].update(passed_over)
