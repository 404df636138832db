"""What a SparseGPT run of a very large model must move and multiply on 1 to 64 GPUs, and the least time that takes.

Arithmetic, not a measurement: shapes of the published configurations, the way that `llmprune` shares the work
(docs/pages/scale.md), and published peak rates of an H200 machine. Rates that our kernels reach on a GPU are not
measured yet; once they are, put them in place of the peaks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import record

SEQUENCES, LENGTH = 128, 2048
TOKENS = SEQUENCES * LENGTH
GPUS = (1, 2, 4, 8, 16, 32, 64)
A_NODE = 8

# Peaks of one H200 SXM and what connects eight of them; sources in docs/pages/scale.md. Units a second.
BF16, FP32 = 989e12, 67e12  # multiplications and additions
NVLINK, INFINIBAND, PCIE = 450e9, 50e9, 63e9  # bytes, one direction, a GPU
STORAGE = 50e9  # bytes, a node: one 400 Gb/s port to shared storage
MEMORY = 141e9


@dataclass(frozen=True)
class Group:
    """Matrices that read one input: `width` inputs, `outputs` in all, `tokens` as a share of all tokens, `copies` of it."""

    name: str
    width: int
    outputs: int
    tokens: float = 1.0
    copies: int = 1


@dataclass(frozen=True)
class Shape:
    name: str
    source: str
    layers: int
    hidden: int
    groups: tuple[Group, ...]

    @property
    def weights(self) -> int:
        return sum(one.width * one.outputs * one.copies for one in self.groups)


# 16384 wide, 128 heads of 128, 8 key-value heads, intermediate 53248, 126 layers
LLAMA = Shape(
    "Llama-3-405B",
    "arXiv:2407.21783, table 3",
    126,
    16384,
    (
        Group("q, k, v", 16384, 16384 + 2 * 1024),
        Group("o", 16384, 16384),
        Group("gate, up", 16384, 2 * 53248),
        Group("down", 53248, 16384),
    ),
)
# 7168 wide, 128 heads, low-rank q (1536) and kv (512), 256 routed experts of 2048, 8 of them active, 1 shared;
# three of the 61 layers are dense, and counted here like the others
DEEPSEEK = Shape(
    "DeepSeek-V3",
    "arXiv:2412.19437, section 4.2",
    61,
    7168,
    (
        Group("q_a, kv_a", 7168, 1536 + 512 + 64),
        Group("q_b", 1536, 128 * 192),
        Group("kv_b", 512, 128 * 256),
        Group("o", 128 * 128, 7168),
        Group("shared gate, up", 7168, 2 * 2048),
        Group("shared down", 2048, 7168),
        Group("expert gate, up", 7168, 2 * 2048, tokens=8 / 256, copies=256),
        Group("expert down", 2048, 7168, tokens=8 / 256, copies=256),
    ),
)


def least_seconds(shape: Shape, gpus: int) -> dict[str, float]:
    """Seconds of every part for one layer, at the peaks: no part can take less."""
    link = NVLINK if gpus <= A_NODE else INFINIBAND
    tokens = TOKENS / gpus
    forward = sum(2 * one.width * one.outputs * one.copies * one.tokens for one in shape.groups) * tokens
    # half of a symmetric product
    sums = sum(one.width**2 * one.copies * one.tokens for one in shape.groups) * tokens
    grams = sum(4 * one.width**2 * one.copies for one in shape.groups)
    # a factorization, and the sweep: every weight meets the columns before it
    costs = sorted(
        (one.width**3 / 3 + one.outputs * one.width**2 for one in shape.groups for _ in range(one.copies)), reverse=True
    )
    loads = [0.0] * gpus
    for cost in costs:
        loads[loads.index(min(loads))] += cost
    alone = gpus == 1
    return {
        # the processes of a node share its page cache
        "read": 2 * shape.weights / STORAGE,
        "copy to the GPU": 2 * shape.weights / PCIE,
        "two forwards": 2 * forward / BF16,
        "Gram matrices": sums / BF16,
        "add them up": 0.0 if alone else grams / link,
        "solve": max(loads) / FP32,
        "hand out the weights": 0.0 if alone else 2 * shape.weights / link,
        "write": 2 * shape.weights / STORAGE,
    }


def bytes_a_gpu(shape: Shape, gpus: int) -> dict[str, float]:
    widest = max(one.width for one in shape.groups)
    return {
        "layer": 2.0 * shape.weights,
        "Gram matrices": float(sum(4 * one.width**2 * one.copies for one in shape.groups)),
        "factor": 2 * 4.0 * widest**2,
        "hidden states": 2 * 2.0 * shape.hidden * TOKENS / gpus,
    }


def _numbers(gpus: int, values: dict[str, float], unit: float, suffix: str) -> list[str]:
    """A row of a table: the values, and their sum."""
    return [str(gpus), *(f"{one / unit:.0f}{suffix}" for one in (*values.values(), sum(values.values())))]


def main() -> None:
    rows: list[dict[str, Any]] = []
    for shape in (LLAMA, DEEPSEEK):
        for gpus in GPUS:
            seconds, memory = least_seconds(shape, gpus), bytes_a_gpu(shape, gpus)
            limit = max(seconds, key=lambda part: seconds[part])
            whole = {part: value * shape.layers for part, value in seconds.items()}
            rows.append({"model": shape.name, "gpus": gpus, "seconds": whole, "limit": limit, "bytes": memory})
    parts = list(rows[0]["seconds"])
    text = ""
    for shape in (LLAMA, DEEPSEEK):
        mine = [row for row in rows if row["model"] == shape.name]
        text += f"## {shape.name} ({shape.source}), seconds at the peaks\n\n"
        text += record.table(
            ["GPUs", *parts, "sum", "most of it"],
            [[*_numbers(row["gpus"], row["seconds"], 1, ""), row["limit"]] for row in mine],
        )
        text += "\n" + record.table(
            ["GPUs", *mine[0]["bytes"], f"sum, of {MEMORY / 1e9:.0f} GB"],
            [_numbers(row["gpus"], row["bytes"], 1e9, " GB") for row in mine],
        )
        text += "\n"
    text += f"{SEQUENCES} x {LENGTH} tokens, SparseGPT, schedule layer, bfloat16. Parts follow each other; nothing overlaps.\n"
    record.save("scale", {"environment": record.environment(), "rows": rows}, text)


if __name__ == "__main__":
    main()
