"""What can run where, and what is worth it: pure functions that answer None, or the reason why not."""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

# Smaller products than this many multiplications are not worth oneDNN's set-up.
SMALLEST_ONEDNN = 1 << 20
HALVES = (torch.bfloat16, torch.float16)
# Beyond this many tokens arithmetic, not memory traffic, is the limit of a product on a GPU.
DECODE_TOKENS = 64


def always(*operands: Any) -> str | None:
    return None


# oneDNN's float32 products.


def onednn(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"oneDNN computes on cpu, not on {device.type}"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this torch has no oneDNN"
    return None


def float32_matrices(*operands: torch.Tensor) -> str | None:
    other = next((one.dtype for one in operands if one.dtype != torch.float32), None)
    return None if other is None else f"it computes float32, not {other}"


def onednn_is_faster(a_MK: torch.Tensor, b_NK: torch.Tensor) -> str | None:
    if a_MK.shape[0] * b_NK.numel() < SMALLEST_ONEDNN:
        return "too small"
    return slow_onednn_processor()


@functools.cache
def slow_onednn_processor() -> str | None:
    """A rule on the processor alone, never a measurement, so that results repeat."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "no 512-bit vector units"
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or "AuthenticAMD" not in cpuinfo.read_text():
        return "not an AMD processor: MKL is as fast"
    return None


# Triton.


def triton(device: torch.device) -> str | None:
    if not _has_triton():
        return "triton is not installed: pip install 'llmprune[kernels]'"
    if device.type == "cuda" or interpreted():
        return None
    return f"triton kernels need a CUDA device or TRITON_INTERPRET=1, and the tensors are on {device.type}"


def not_interpreted(*operands: torch.Tensor) -> str | None:
    return "triton's interpreter is for tests" if interpreted() else None


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


# 2:4 matrices.


def packed24(values_OV: torch.Tensor, metadata_OB: torch.Tensor) -> str | None:
    if values_OV.dtype not in HALVES:
        return f"it computes bfloat16 and float16, not {values_OV.dtype}"
    if values_OV.shape[1] % 16:
        return f"{values_OV.shape[1] * 2} inputs are no multiple of 32"
    if not values_OV.is_contiguous() or not metadata_OB.is_contiguous():
        return "the packed weights have gaps"
    return None


def decode24(x_TI: torch.Tensor, values_OV: torch.Tensor, metadata_OB: torch.Tensor) -> str | None:
    if not 0 < len(x_TI) <= DECODE_TOKENS:
        return f"{len(x_TI)} tokens are not 1 to {DECODE_TOKENS}"
    if x_TI.dtype != values_OV.dtype:
        return f"inputs of {x_TI.dtype} and weights of {values_OV.dtype}"
    if x_TI.stride(1) != 1:
        return "the inputs of a token are not contiguous"
    return packed24(values_OV, metadata_OB)
