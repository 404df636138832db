"""Where the tests of Triton kernels run: in Triton's interpreter, or with TRITON_INTERPRET=0 compiled on a GPU.

Import this before any kernel; conftest.py has switched the interpreter on if nobody said otherwise. The interpreter runs
kernels on CPU, line by line. It holds bfloat16 as bit patterns in uint16 and computes on the patterns; here operands of
arithmetic and of `tl.dot` are widened first (exact), and results rounded back.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("TRITON_INTERPRET is not 1, and there is no GPU", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed (pip install 'llmprune[kernels]')")

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
if INTERPRETED and triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
    pytest.skip("the interpreter of triton 3.6 needs numpy below 2.4", allow_module_level=True)

Builder = interpreter.InterpreterBuilder
_dot, _binary = Builder.create_dot, Builder.binary_op


def _is_bfloat16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _widen(builder: Any, handle: Any) -> Any:
    return builder.cast_impl(handle, tl.float32) if _is_bfloat16(handle) else handle


def _create_dot(self: Any, a: Any, b: Any, sums: Any, *rest: Any) -> Any:
    return _dot(self, _widen(self, a), _widen(self, b), sums, *rest)


def _binary_op(self: Any, left: Any, right: Any, op: Callable[..., Any]) -> Any:
    if not (_is_bfloat16(left) and _is_bfloat16(right)):
        return _binary(self, left, right, op)
    found = op(_widen(self, left).data, _widen(self, right).data)
    if found.dtype == np.bool_:
        return interpreter.TensorHandle(found, tl.int1)
    return self.cast_impl(interpreter.TensorHandle(found.astype(np.float32), tl.float32), tl.bfloat16)


if INTERPRETED:
    Builder.create_dot, Builder.binary_op = _create_dot, _binary_op
