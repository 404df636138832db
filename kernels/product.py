"""Float32 products on CPU by the faster of torch's two libraries.

torch sends float32 products to MKL, which on AMD processors leaves the 512-bit units unused;
oneDNN, which torch also carries, uses them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from llmprune.kernels.dispatch import choose


def product_nt(a_MK: torch.Tensor, b_NK: torch.Tensor) -> torch.Tensor:
    """`a_MK @ b_NK.T` in the dtype of its operands: the natural form of both libraries."""
    product: torch.Tensor = choose("product", a_MK, b_NK).run(a_MK, b_NK)
    return product


def product_torch(a_MK: torch.Tensor, b_NK: torch.Tensor) -> torch.Tensor:
    return a_MK @ b_NK.T


def product_onednn(a_MK: torch.Tensor, b_NK: torch.Tensor) -> torch.Tensor:
    if not a_MK.numel() or not b_NK.numel():
        return a_MK @ b_NK.T  # oneDNN knows no empty product
    return _onednn(_dense(a_MK) if a_MK.stride(1) != 1 else a_MK, _dense(b_NK), None)


def use_onednn(a_MK: torch.Tensor, b_NK: torch.Tensor) -> bool:
    """Whether the product of these two, over K, goes to oneDNN."""
    return choose("product", a_MK, b_NK).name == "onednn"


class FastLinear(TorchFunctionMode):
    """While active, large float32 `linear` calls of a model on CPU go where `product_nt` goes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs:
            x, weight_OI, bias = (*args, None)[:3]
            plain = x.device.type == "cpu" and x.dtype == weight_OI.dtype == torch.float32
            matrix = plain and x.dim() > 1 and x.numel() and weight_OI.is_contiguous()
            if matrix and use_onednn(x.reshape(-1, x.shape[-1]), weight_OI):
                if torch.is_grad_enabled() and (x.requires_grad or weight_OI.requires_grad):
                    return _Linear.apply(x, weight_OI, bias)  # type: ignore[no-untyped-call]
                return _onednn(x, weight_OI, bias)
        return func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    """`F.linear` whose three products go where `product_nt` goes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_OI: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight_OI)
        return _onednn(x, weight_OI, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight_OI = ctx.saved_tensors
        grad_TO = grads[0].reshape(-1, len(weight_OI))
        for_x = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            for_x = product_nt(grad_TO, weight_OI.T).view(x.shape)
        if ctx.needs_input_grad[1]:
            for_weight = product_nt(grad_TO.T, x.reshape(-1, x.shape[-1]).T)
        if ctx.needs_input_grad[2]:
            for_bias = grad_TO.sum(0)
        return for_x, for_weight, for_bias


def _dense(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix without gaps between its rows or columns: oneDNN is thousandfold slower on a slice."""
    if matrix.is_contiguous() or matrix.T.is_contiguous():
        return matrix
    return matrix.T.contiguous().T if matrix.stride(0) == 1 else matrix.contiguous()


def _onednn(x: torch.Tensor, weight_OI: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_OI, bias, "none", [], "")
    return result
