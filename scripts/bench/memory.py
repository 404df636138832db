"""Peak memory of pruning checkpoints that differ in depth only.

Makes synthetic bfloat16 Llama checkpoints (32 equal layers are 8 GB), prunes each by SparseGPT 2:4 on
8 x 256 random tokens, and records the peak of anonymous resident memory: what the process itself
allocated. Mapped pages of the checkpoint, which the system can drop at any time, are reported apart.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import record
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 4096, 7168, 32, 8, 8192
LAYERS_A_SHARD = 4

RUN = """
import json, sys, torch, llmprune
model, out = sys.argv[1:]
tokens = torch.randint(0, {vocabulary}, (8, 256), generator=torch.Generator().manual_seed(0))
result = llmprune.prune(model, out=out, method="sparsegpt", pattern="2:4", calibration=list(tokens), batch_size=8)
print(json.dumps(result.report["run"] | {{"zeros": result.report["totals"]["zeros"]}}))
"""


def make_checkpoint(folder: Path, layers: int) -> int:
    """Write a random Llama shard by shard; returns its bytes."""
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCABULARY,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
        tie_word_embeddings=True,
    )
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def random(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    weight_map: dict[str, str] = {}
    total = 0
    shard = {
        "model.embed_tokens.weight": random(VOCABULARY, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN).bfloat16(),
    }
    for layer in range(layers):
        shard |= {f"model.layers.{layer}.{name}.weight": random(*shape) for name, shape in shapes.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            shard[f"model.layers.{layer}.{name}.weight"] = torch.ones(HIDDEN).bfloat16()
        if (layer + 1) % LAYERS_A_SHARD == 0 or layer + 1 == layers:
            name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
            save_file(shard, folder / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, name)
            total += sum(one.numel() * one.element_size() for one in shard.values())
            shard = {}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def measure(layers: int, scratch: Path) -> dict[str, Any]:
    """Prune one checkpoint in a process of its own."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    try:
        (folder / "model").mkdir()
        size = make_checkpoint(folder / "model", layers)
        run = [sys.executable, "-c", RUN.format(vocabulary=VOCABULARY), str(folder / "model"), str(folder / "out")]
        done = subprocess.run(run, check=True, capture_output=True, text=True)
        report = json.loads(done.stdout)
        return {
            "layers": layers,
            "bytes": size,
            "peak": report["peak_memory"],
            "seconds": report["seconds"],
            "zeros": report["zeros"],
        }
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="*", default=[32, 64])
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="folder for the checkpoints")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for layers in arguments.layers:
        rows.append(measure(layers, arguments.scratch))
        save(rows)


def save(rows: list[dict[str, Any]]) -> None:
    growth = rows[-1]["peak"]["anonymous"] / rows[0]["peak"]["anonymous"] - 1
    lines = [
        [
            str(row["layers"]),
            f"{row['bytes'] / 1e9:.2f} GB",
            f"{row['peak']['anonymous'] / 1e9:.3f} GB",
            f"{row['peak']['resident'] / 1e9:.3f} GB",
            f"{row['seconds']:.0f} s",
        ]
        for row in rows
    ]
    text = record.table(["layers", "checkpoint", "peak anonymous", "peak with mapped pages", "time"], lines)
    text += f"\nAnonymous peak at {rows[-1]['layers']} layers against {rows[0]['layers']}: {growth:+.1%}. "
    text += f"Hidden {HIDDEN}, intermediate {INTERMEDIATE}, {HEADS} heads, {KV_HEADS} kv heads; SparseGPT 2:4, 8 x 256 random tokens, schedule layer, seed 0.\n"
    record.save("memory", {"environment": record.environment(), "rows": rows, "growth": growth}, text)


if __name__ == "__main__":
    main()
