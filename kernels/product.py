"""Float32 matrix products on CPU by the faster of torch's two libraries.

torch sends float32 products to MKL, which on AMD processors leaves the 512-bit units unused;
oneDNN, which torch also carries, uses them.
The choice depends on the processor alone, never on a measurement, so that results repeat.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# Smaller products than this many multiplications are not worth oneDNN's set-up.
SMALLEST = 1 << 20


@functools.cache
def why_not_onednn() -> str | None:
    """None if float32 products on this machine's CPU go to oneDNN, else the reason why torch's own are used."""
    if os.environ.get("LLMPRUNE_KERNELS") == "torch":
        return "LLMPRUNE_KERNELS=torch"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this torch has no oneDNN"
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "no 512-bit vector units"
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or "AuthenticAMD" not in cpuinfo.read_text():
        return "not an AMD processor: MKL is as fast"
    return None


def product_nt(a_MK: torch.Tensor, b_NK: torch.Tensor) -> torch.Tensor:
    """`a_MK @ b_NK.T` in the dtype of its operands: the natural form of both libraries."""
    if use_onednn(a_MK, b_NK):
        return _onednn(_dense(a_MK) if a_MK.stride(1) != 1 else a_MK, _dense(b_NK), None)
    return a_MK @ b_NK.T


def use_onednn(a_MK: torch.Tensor, b_NK: torch.Tensor) -> bool:
    """Whether the product of these two, over K, goes to oneDNN."""
    plain = a_MK.device.type == "cpu" and a_MK.dtype == b_NK.dtype == torch.float32
    return plain and a_MK.shape[0] * b_NK.numel() >= SMALLEST and why_not_onednn() is None


class FastLinear(TorchFunctionMode):
    """While active, large float32 `linear` calls of a model on CPU go where `product_nt` goes.

    Not while gradients are recorded: the fast operator has none.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs and not torch.is_grad_enabled():
            x, weight_OI, bias = (*args, None)[:3]
            if x.dim() > 1 and weight_OI.is_contiguous() and use_onednn(x.reshape(-1, x.shape[-1]), weight_OI):
                return _onednn(x, weight_OI, bias)
        return func(*args, **(kwargs or {}))


def _dense(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix without gaps between its rows or columns: oneDNN is thousandfold slower on a slice."""
    if matrix.is_contiguous() or matrix.T.is_contiguous():
        return matrix
    return matrix.T.contiguous().T if matrix.stride(0) == 1 else matrix.contiguous()


def _onednn(x: torch.Tensor, weight_OI: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_OI, bias, "none", [], "")
    return result
