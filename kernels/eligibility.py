"""What can run where, and what is worth it: pure functions that answer None, or the reason why not."""

from __future__ import annotations

import functools
import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmprune.kernels import tuned
from llmprune.types import Budget

# Smaller products than this many multiplications are not worth oneDNN's set-up.
SMALLEST_ONEDNN = 1 << 20
HALVES = (torch.bfloat16, torch.float16)
# Beyond this many tokens arithmetic, not memory traffic, is the limit of a product on a GPU.
DECODE_TOKENS = 64
LARGEST_BLOCK = 128
# For as many tokens the surplus of a 2:4 matrix is added one weight at a time.
OVERFLOW_TOKENS = 8
# cuSPARSELt takes matrices whose sizes are multiples of the first, and numbers of tokens of the second.
CUSPARSELT_SIZES, CUSPARSELT_TOKENS = 16, 8


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
    if triton_version() is None:
        return "triton is not installed: pip install 'llmprune[kernels]'"
    if device.type == "cuda" or interpreted():
        return None
    return f"triton kernels need a CUDA device or TRITON_INTERPRET=1, and the tensors are on {device.type}"


def mma_sp(device: torch.device) -> str | None:
    """Sparse tensor cores, which Gluon reaches; it has no interpreter."""
    if triton_version() is None or device.type != "cuda" or interpreted():
        return triton(device) or "Gluon kernels have no interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"compute capability {major}.{minor} has no sparse tensor cores"


def measured(kernel: str, sizes: Callable[..., dict[str, int]], *operands: torch.Tensor) -> str | None:
    """A kernel runs by itself only where it was found, at about these sizes, to be right and the fastest."""
    if interpreted():
        return "triton's interpreter is for tests"
    device = operands[0].device
    if tuned.is_faster(kernel, device, **sizes(*operands)):
        return None
    return f"no measurement on this GPU ({tuned.name_of(device)}) says that it is the fastest at this size"


def any_size(*operands: Any) -> dict[str, int]:
    return {}


def gram_sizes(lower_II: torch.Tensor, x_TI: torch.Tensor, *more: torch.Tensor) -> dict[str, int]:
    return {"bits": x_TI.dtype.itemsize * 8}


def product_sizes(x_TI: torch.Tensor, values_OV: torch.Tensor, *rest: Any) -> dict[str, int]:
    return {"tokens": len(x_TI), "outputs": len(values_OV)}


def bitmask_sizes(x_TI: torch.Tensor, values_V: torch.Tensor, words_OW: torch.Tensor, *rest: Any) -> dict[str, int]:
    return product_sizes(x_TI, words_OW)


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


# Statistics and SparseGPT.


def gram(lower_II: torch.Tensor, x_TI: torch.Tensor, *more: torch.Tensor) -> str | None:
    lowers, inputs = [lower_II, *more[::2]], [x_TI, *more[1::2]]
    if any(one.shape != lower_II.shape or one.dtype != torch.float32 or not one.is_contiguous() for one in lowers):
        return "the Gram matrices are not contiguous float32 of one size"
    if any(one.dtype != x_TI.dtype or one.device != lower_II.device for one in inputs):
        return "the inputs differ in dtype or device"
    return float_rows(x_TI)


def float_rows(x_TI: torch.Tensor) -> str | None:
    return None if x_TI.dtype in (*HALVES, torch.float32) else f"it reads 16-bit floats and float32, not {x_TI.dtype}"


def sparsegpt_block(
    current_BO: torch.Tensor, inverse_t_BB: torch.Tensor, pruned_BO: torch.Tensor, budget: Budget
) -> str | None:
    if len(current_BO) > LARGEST_BLOCK:
        return f"a block of {len(current_BO)} columns does not fit the registers: at most {LARGEST_BLOCK}"
    if budget.pattern.group not in (0, 2, 4, 8, 16):
        return f"groups of {budget.pattern.group} are no power of two up to 16"
    return float32_matrices(current_BO, inverse_t_BB)


# 2:4 matrices.


def packed24(values_OV: torch.Tensor, metadata_OB: torch.Tensor) -> str | None:
    if values_OV.dtype not in HALVES:
        return f"it computes bfloat16 and float16, not {values_OV.dtype}"
    if values_OV.shape[1] % 16:
        return f"{values_OV.shape[1] * 2} inputs are no multiple of 32"
    if not values_OV.is_contiguous() or not metadata_OB.is_contiguous():
        return "the packed weights have gaps"
    return None


def matmul24(x_TI: torch.Tensor, values_OV: torch.Tensor, metadata_OB: torch.Tensor, *rest: Any) -> str | None:
    return _inputs(x_TI, values_OV) or packed24(values_OV, metadata_OB)


def decode_mma_sp(x_TI: torch.Tensor, values_OV: torch.Tensor, metadata_OB: torch.Tensor, *rest: Any) -> str | None:
    outputs, inputs = len(values_OV), values_OV.shape[1] * 2
    if outputs % 16:
        return f"{outputs} outputs are no multiple of 16"
    if inputs % 64:
        return f"{inputs} inputs are no multiple of 64"
    if x_TI.stride(0) % 2 or x_TI.storage_offset() % 2:
        return "pairs of inputs are not aligned"
    return matmul24(x_TI, values_OV, metadata_OB)


def cusparselt(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"cuSPARSELt computes on cuda, not on {device.type}"
    return None if torch.backends.cusparselt.is_available() else "this torch has no cuSPARSELt"


def cusparselt_matrix(values_OV: torch.Tensor) -> str | None:
    if values_OV.dtype not in HALVES:
        return f"it computes bfloat16 and float16, not {values_OV.dtype}"
    odd = [size for size in (len(values_OV), values_OV.shape[1] * 2) if size % CUSPARSELT_SIZES]
    return f"{odd[0]} is no multiple of {CUSPARSELT_SIZES}" if odd else None


def prefill_cusparselt(
    x_TI: torch.Tensor, values_OV: torch.Tensor, metadata_OB: torch.Tensor, compressed: torch.Tensor | None
) -> str | None:
    if compressed is None:
        return "the compressed form is not kept: accelerate(..., prefill=True)"
    if len(x_TI) <= DECODE_TOKENS:
        return f"{len(x_TI)} tokens are not more than {DECODE_TOKENS}"
    return _inputs(x_TI, values_OV)


def cusparselt_is_faster(
    x_TI: torch.Tensor, values_OV: torch.Tensor, metadata_OB: torch.Tensor, compressed: torch.Tensor | None
) -> str | None:
    """Who keeps the compressed form has asked for it; it is used from as many tokens on as were measured to pay."""
    outputs = len(values_OV)
    least = tuned.configuration("matmul24_cusparselt", x_TI.device, outputs=outputs)["LEAST_TOKENS"]
    if len(x_TI) < least:
        return f"{len(x_TI)} tokens are fewer than the {least} from which it pays at {outputs} outputs"
    return None


# Unstructured matrices.


def decode_bitmask(x_TI: torch.Tensor, values_V: torch.Tensor, *rest: torch.Tensor) -> str | None:
    if values_V.dtype not in HALVES:
        return f"it computes bfloat16 and float16, not {values_V.dtype}"
    if len(x_TI) > DECODE_TOKENS:
        return f"{len(x_TI)} tokens are more than {DECODE_TOKENS}"
    return _inputs(x_TI, values_V)


def decode_overflow(x_TI: torch.Tensor, values_OV: torch.Tensor, metadata_OB: torch.Tensor, *rest: Any) -> str | None:
    if len(x_TI) > OVERFLOW_TOKENS:
        return f"{len(x_TI)} tokens are more than {OVERFLOW_TOKENS}"
    return matmul24(x_TI, values_OV, metadata_OB)


def _inputs(x_TI: torch.Tensor, values: torch.Tensor) -> str | None:
    if not len(x_TI):
        return "there are no tokens"
    if x_TI.dtype != values.dtype:
        return f"inputs of {x_TI.dtype} and weights of {values.dtype}"
    return None if x_TI.stride(1) == 1 else "the inputs of a token are not contiguous"
