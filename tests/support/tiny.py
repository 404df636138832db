"""Tiny random models of every layout that the project must handle, and tokens to run through them.

`TINY[name]` is a configuration written out by hand; `build(name)` the model. Weights are random with
a fixed seed, and none is left at the zeros or ones that an initialisation gives: norms, biases,
routers and padding embeddings differ from row to row, so that a mistake about any of them shows.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

VOCABULARY = 128
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
MODERN = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NOISE = 0.15
EXPERTS = 4
# Layouts with fused experts, and those of them that store them as experts x inputs x outputs.
FUSED = ["mixtral", "qwen3-moe", "deepseek-v3", "gpt-oss", "llama4", "qwen3-next"]
INPUTS_FIRST = ["gpt-oss", "llama4"]

TINY: dict[str, Any] = {
    "llama": LlamaConfig(**MODERN, **SPECIAL),
    "qwen3": Qwen3Config(**MODERN, **SPECIAL, head_dim=16),
    "gemma3": Gemma3TextConfig(
        **MODERN,
        **SPECIAL,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "opt": OPTConfig(**SIZES, **SPECIAL, ffn_dim=64, word_embed_proj_dim=24, max_position_embeddings=64),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, **SPECIAL),
    "gpt-neox": GPTNeoXConfig(**SIZES, **SPECIAL, intermediate_size=64, max_position_embeddings=64),
    "phi3": Phi3Config(**MODERN, **SPECIAL),
    "falcon": FalconConfig(**SIZES, **SPECIAL, max_position_embeddings=64),
    "bloom": BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=3, n_head=4, **SPECIAL),
    "mixtral": MixtralConfig(**MODERN, **SPECIAL, num_local_experts=EXPERTS, num_experts_per_tok=2),
    "qwen3-moe": Qwen3MoeConfig(
        **MODERN,
        **SPECIAL,
        head_dim=8,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=True,
        mlp_only_layers=[0],
    ),
    "deepseek-v3": DeepseekV3Config(
        **{**MODERN, "num_key_value_heads": 4},
        **SPECIAL,
        first_k_dense_replace=1,
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=2,
        moe_intermediate_size=24,
        q_lora_rank=16,
        kv_lora_rank=12,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=12,
    ),
    "gpt-oss": GptOssConfig(
        **{**MODERN, "intermediate_size": 24},
        **SPECIAL,
        head_dim=8,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "llama4": Llama4TextConfig(
        **{**MODERN, "intermediate_size": 24},
        **SPECIAL,
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=EXPERTS,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        attention_chunk_size=16,
        no_rope_layer_interval=3,
    ),
    "mamba": MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, state_size=8, time_step_rank=4, **SPECIAL
    ),
    "qwen3-next": Qwen3NextConfig(
        **MODERN,
        **SPECIAL,
        head_dim=8,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=16,
    ),
}


def build(name: str, *, seed: int = 0) -> PreTrainedModel:
    """The tiny model `name` in float32, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(TINY[name]), dtype=torch.float32)
        with torch.no_grad():
            for tensor in model.state_dict(keep_vars=True).values():
                if tensor.is_floating_point():
                    tensor += NOISE * torch.randn_like(tensor)
    return model.eval()


def save(name: str, folder: Path, *, shards: bool = False, seed: int = 0) -> Path:
    """Save the tiny model `name` as a checkpoint, in several files if `shards`."""
    build(name, seed=seed).save_pretrained(folder, max_shard_size="40KB" if shards else "5GB")
    return folder


def tokens(count: int = 5, length: int = 24, *, seed: int = 0) -> torch.Tensor:
    """Random token ids, count x length; the padding token is among them, as ordinary text."""
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))
