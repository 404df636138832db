"""A tiny random model of every type of causal language model that transformers knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TYPES

VOCABULARY, LAYERS, MOST_PARAMETERS = 128, 4, 4_000_000
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# Encoders (as decoders, some have published checkpoints; their configuration then says is_decoder), halves of
# encoder-decoders, models of sound, and heads that draft for another model.
NO_DECODERS = {
    "bart",
    "bert",
    "bert-generation",
    "big_bird",
    "bigbird_pegasus",
    "blenderbot",
    "blenderbot-small",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "gemma4_assistant",
    "gemma4_unified_assistant",
    "marian",
    "mbart",
    "megatron-bert",
    "moshi",
    "moss_transcribe_diarize",
    "musicgen",
    "musicgen_melody",
    "mvp",
    "pegasus",
    "plbart",
    "prophetnet",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "trocr",
    "whisper",
    "xlm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xlnet",
    "xmod",
}

# Decoders that run a layer several times on a text, or only where there are pictures.
NOT_ONCE = {"hrm_text", "mllama"}

SIZES: dict[str, Any] = {
    size: value
    for names, value in (
        ("vocab_size vocab_size_per_layer_input encoder_hash_byte_group_vocab decoder_vocab_size", VOCABULARY),
        ("unpadded_vocab_size shape_vocab_size pronunciation_vocab_size ngram_vocab_size_base", VOCABULARY),
        ("hidden_size n_embd d_model emb_dim embedding_dim lru_width dim_model_base embedding_size", 32),
        (
            "word_embed_proj_dim input_embedding_size output_embedding_size cross_attention_hidden_size ple_embed_dim",
            32,
        ),
        ("out_hidden_size projection_dim adapter_in_dim adapter_out_dim hidden_size_global adapter_input_size", 32),
        ("intermediate_size n_inner ffn_dim d_inner decoder_ffn_dim encoder_ffn_dim dff dim_ff feed_forward_size", 48),
        ("ffn_hidden_size intermediate_size_mlp dense_intermediate_size mlp_dim", 48),
        ("moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size shape_embed_dim", 24),
        ("shared_experts_intermediate_size moe_shared_expert_intermediate_size shared_intermediate_size", 24),
        ("num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads", 4),
        ("encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads", 4),
        ("swa_num_attention_heads linear_num_heads linear_num_value_heads index_n_heads", 4),
        ("num_key_value_heads swa_num_key_value_heads num_kv_heads kv_n_heads linear_num_key_heads", 2),
        ("head_dim kv_channels swa_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim", 8),
        ("dim_head d_head qk_rope_head_dim qk_nope_head_dim v_head_dim index_head_dim global_head_dim rotary_dim", 8),
        ("hidden_size_per_layer_input query_pre_attn_scalar state_size mamba_d_state ssm_state_size", 8),
        ("pronunciation_embed_dim mamba_d_head mamba_head_dim attention_head_size", 8),
        ("qk_head_dim", 16),
        ("num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers", LAYERS),
        ("num_decoder_layers num_blocks max_window_layers depth", LAYERS),
        ("num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num", 4),
        ("num_experts_per_tok moe_topk moe_k num_experts_per_token moe_top_k", 2),
        ("n_group num_expert_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts", 1),
        ("first_k_dense_replace num_dense_layers", 1),
        ("q_lora_rank kv_lora_rank o_lora_rank laurel_rank mamba_dt_rank time_step_rank router_hidden_size", 12),
        ("hc_lowrank adapter_rank", 12),
        ("max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length", 64),
        ("max_target_positions max_source_positions original_max_position_embeddings attention_window_size", 64),
        ("sliding_window sliding_window_size local_attention attention_chunk_size index_topk keep_window_size", 16),
        ("window_size chunk_size mamba_chunk_size block_size image_size", 16),
        ("patch_size", 8),
        ("mamba_n_heads mamba_num_heads", 8),
        ("prompt_length prompt_types segment_types", 4),
    )
    for size in names.split()
}
# Keys that may be missing or null by default and that a model then cannot be built without.
NEEDED = (
    *("head_dim", "num_key_value_heads", "num_experts_per_tok", "n_routed_experts", "moe_intermediate_size"),
    "n_shared_experts",
)
# One entry a layer: every kind in turn.
BY_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types", "attn_layers", "block_types")
# What the sizes alone do not settle.
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
INDEXED = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
FIXES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {**ROPE, "mrope_section": [2, 1, 1]}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 16},
    "dots3_note": {"text_config": {"per_layer_config": {}, "head_dim": 16}},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 1, "intermediate_size": [48] * LAYERS},
    "inkling2_text": {"n_layers_per_attn_res_block": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": INDEXED,
    "qwen4_exp": {"text_config": INDEXED},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
}


def shrink(cls: Any, fixes: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a configuration class that make it tiny, those of its sub-configurations included."""
    default = cls()
    depth = getattr(default, "num_hidden_layers", None)
    given: dict[str, Any] = {}
    for key, value in default.to_dict().items():
        if key in getattr(cls, "sub_configs", {}):
            sub = type(getattr(default, key, None))
            if hasattr(sub, "model_type"):
                given[key] = shrink(sub, fixes.get(key, {}))
        elif key in SIZES and ((value is None and key in NEEDED) or (type(value) is int and value > 1)):
            given[key] = SIZES[key]
        elif key in BY_LAYER and value:
            kinds = list(dict.fromkeys(value))
            given[key] = [kinds[place % len(kinds)] for place in range(LAYERS)]
        elif isinstance(value, list) and len(value) == depth and depth > LAYERS:
            given[key] = value[:LAYERS]
        elif key in SPECIAL:
            given[key] = SPECIAL[key]
    if "kv_lora_rank" in given and "num_key_value_heads" in given:
        given["num_key_value_heads"] = given["num_attention_heads"]
    subs = getattr(cls, "sub_configs", {})
    return given | {key: value for key, value in fixes.items() if key not in subs}


def config_of(kind: str) -> Any:
    """The configuration of the tiny model of a type."""
    cls = CONFIG_MAPPING[kind]
    return cls(**shrink(cls, FIXES.get(kind, {})))


def build(kind: str) -> PreTrainedModel:
    """The tiny model of a type, random in every parameter, in evaluation mode."""
    config = config_of(kind)
    with torch.device("meta"):
        shapes = {name: tuple(one.shape) for name, one in AutoModelForCausalLM.from_config(config).named_parameters()}
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    if sum(sizes.values()) > MOST_PARAMETERS:
        largest = max(sizes, key=lambda name: sizes[name])
        raise ValueError(f"{sum(sizes.values())} parameters are too many; the largest is {largest} {shapes[largest]}")
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for tensor in model.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor += 0.1 * torch.randn_like(tensor)
    return model.eval()


def save(kind: str, model: PreTrainedModel, folder: Path) -> None:
    """Write a model of a type as its published checkpoints are."""
    model.save_pretrained(folder)
    if model.config.model_type not in TYPES:
        # the text part of a larger model, which is not found by the name of its own configuration
        config_of(kind).save_pretrained(folder)
