"""More tiny layouts, for what depends on how heads and channels lie in the parameters."""

from __future__ import annotations

from typing import Any

import tiny
from transformers import (
    ApertusConfig,
    ArceeConfig,
    Cohere2Config,
    Ernie4_5Config,
    FalconConfig,
    Gemma2Config,
    GlmConfig,
    GPTJConfig,
    GraniteConfig,
    HeliumConfig,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    Olmo2Config,
    OlmoeConfig,
    PhiConfig,
    Qwen2Config,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

# Eight heads in four groups: some may go and the hidden size still divides by what is left.
WIDE: dict[str, Any] = {**tiny.MODERN, **tiny.SPECIAL, "num_attention_heads": 8, "num_key_value_heads": 4}
MORE: dict[str, Any] = {
    "llama": LlamaConfig(**WIDE),
    "mistral": MistralConfig(**WIDE),
    "qwen2": Qwen2Config(**WIDE),
    "gemma2": Gemma2Config(**WIDE, head_dim=6, query_pre_attn_scalar=6),
    # its norm over all heads shares one epsilon with norms whose width stays: an epsilon that matters is off there
    "olmo2": Olmo2Config(**WIDE, rms_norm_eps=1e-12),
    "smollm3": SmolLM3Config(**WIDE, no_rope_layers=[1, 0, 1]),
    "granite": GraniteConfig(**WIDE),
    "stablelm": StableLmConfig(**WIDE),
    "starcoder2": Starcoder2Config(**WIDE),
    "olmoe": OlmoeConfig(**WIDE, num_experts=4, num_experts_per_tok=2),
    "arcee": ArceeConfig(**WIDE, head_dim=4),
    "apertus": ApertusConfig(**WIDE),  # its activation holds buffers
    "glm": GlmConfig(**WIDE, head_dim=8),
    "phi": PhiConfig(**WIDE),
    "falcon-mha": FalconConfig(**tiny.SIZES, **tiny.SPECIAL, multi_query=False, alibi=True, max_position_embeddings=64),
    "falcon-new": FalconConfig(
        **tiny.SIZES, **tiny.SPECIAL, new_decoder_architecture=True, num_kv_heads=2, max_position_embeddings=64
    ),
    "cohere2": Cohere2Config(**WIDE, sliding_window=6, layer_types=["sliding_attention"] * 3),
    "helium": HeliumConfig(**WIDE, head_dim=4),
    "ernie4.5": Ernie4_5Config(**WIDE, head_dim=4),
    "mpt": MptConfig(vocab_size=tiny.VOCABULARY, d_model=32, n_layers=3, n_heads=4, max_seq_len=64),
    "gptj": GPTJConfig(
        vocab_size=tiny.VOCABULARY, n_embd=32, n_layer=3, n_head=4, rotary_dim=4, n_positions=64, **tiny.SPECIAL
    ),
}
