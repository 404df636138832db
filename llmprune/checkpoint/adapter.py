"""What is to be added to a model's matrices, as an adapter in PEFT's format."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from llmprune.checkpoint.output import save_tensors, write_json
from llmprune.types import MatrixSpec

FOLDER = "adapter"


def write_adapter(folder: Path, parts: Iterable[tuple[MatrixSpec, torch.Tensor, torch.Tensor]]) -> None:
    """Write `folder`: for each matrix (no expert) B (O x R) and A (R x I), whose product is added to it, in float32.

    `PeftModel.from_pretrained(model, folder)` of the library peft reads it. Holds all of them in memory.
    """
    from peft import LoraConfig

    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    transposed = False
    for spec, b_OR, a_RI in parts:
        module = spec.parameter.removesuffix(".weight")
        if len(a_RI):
            ranks[module] = len(a_RI)
            tensors[f"base_model.model.{module}.lora_A.weight"] = a_RI.cpu().contiguous()
            tensors[f"base_model.model.{module}.lora_B.weight"] = b_OR.cpu().contiguous()
        transposed = transposed or bool(spec.transposed)
    folder.mkdir(exist_ok=True)
    config = LoraConfig(
        target_modules=list(ranks),
        rank_pattern=ranks,
        alpha_pattern=ranks,
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    save_tensors(tensors, folder / "adapter_model.safetensors")
    # peft keeps the names as a set, whose order is not always the same
    write_json(folder / "adapter_config.json", {**config.to_dict(), "target_modules": sorted(ranks)})
