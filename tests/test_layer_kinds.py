"""Layers that the position makes what they are, once others are gone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
from depth_models import load, logits, skip
from transformers import GPTNeoConfig, JambaConfig, Qwen2Config

import llmprune
from llmprune.checkpoint.layer_lists import edit_config
from llmprune.types import UserError

# Configurations.


def test_periods_and_prefixes_become_what_each_kept_layer_was() -> None:
    moe = copy.deepcopy(tiny.TINY["qwen3-moe"])
    moe.num_hidden_layers, moe.decoder_sparse_step, moe.mlp_only_layers = 6, 2, [3]
    sparse = [False, True, False, False, False, True]  # (i + 1) % 2 == 0, and 3 is named
    edited = edit_config(moe, (1, 2, 3, 5), 6, sparse, None)
    assert (edited.decoder_sparse_step, edited.mlp_only_layers) == (1, [1, 2])
    deep = copy.deepcopy(tiny.TINY["deepseek-v3"])
    deep.num_hidden_layers, deep.first_k_dense_replace = 5, 2
    assert edit_config(deep, (0, 2, 3), 5, [False, False, True, True, True], None).first_k_dense_replace == 1
    qwen = Qwen2Config(num_hidden_layers=4, use_sliding_window=True, sliding_window=8, max_window_layers=2)
    edited = edit_config(qwen, (1, 3), 4, [False] * 4, None)
    assert edited.layer_types == ["full_attention", "sliding_attention"]
    neo = GPTNeoConfig(num_layers=4, attention_types=[[["global", "local"], 2]])
    edited = edit_config(neo, (0, 1, 3), 4, [False] * 4, None)
    assert type(neo).from_dict(edited.to_dict()).attention_layers == ["global", "local", "local"]
    short = copy.deepcopy(tiny.TINY["llama"])
    short.eos_token_id = [5, 6, 7]  # as long as the model is deep, but no list of layers
    assert edit_config(short, (0,), 3, [False] * 3, None).eos_token_id == [5, 6, 7]


@pytest.mark.parametrize("name", ["gpt-neo", "qwen2"])
def test_kinds_of_layers_that_only_position_tells(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"vocab_size": 128, **tiny.SPECIAL}
    configs: dict[str, Any] = {
        "gpt-neo": GPTNeoConfig(
            **sizes,
            hidden_size=32,
            num_heads=4,
            num_layers=4,
            attention_types=[[["global", "local"], 2]],
            window_size=3,
        ),
        "qwen2": Qwen2Config(
            **{**tiny.MODERN, "num_hidden_layers": 4},
            **tiny.SPECIAL,
            use_sliding_window=True,
            sliding_window=3,
            max_window_layers=2,
        ),
    }
    monkeypatch.setitem(tiny.TINY, name, configs[name])
    source = tiny.save(name, tmp_path / "dense")
    llmprune.prune(source, out=tmp_path / "out", drop_layers=[0, 1])
    ids = tiny.tokens(2, 12)
    expected = logits(skip(tiny.build(name), [0, 1]), ids)
    assert float((logits(load(tmp_path / "out"), ids) - expected).abs().max()) <= 1e-6


def test_a_layer_that_would_become_another_kind_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jamba = JambaConfig(
        **{**tiny.MODERN, "num_hidden_layers": 4},
        **tiny.SPECIAL,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=4,
        mamba_d_state=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    )
    scaled = copy.deepcopy(tiny.TINY["gpt2"])
    scaled.scale_attn_by_inverse_layer_idx = True
    for name, config in (("jamba", jamba), ("gpt2", scaled)):
        monkeypatch.setitem(tiny.TINY, name, config)
        with pytest.raises(UserError, match="another kind of layer"):
            llmprune.prune(tiny.build(name), drop_layers=[0])
    # without the attention layer, transformers' hybrid cache has nothing to count positions by
    with pytest.raises(UserError, match="full attention"):
        llmprune.prune(tiny.build("qwen3-next"), drop_layers=[1])
    shared = copy.deepcopy(tiny.TINY["llama"])
    shared.num_kv_shared_layers = 1
    with pytest.raises(UserError, match="provide"):
        edit_config(shared, (0, 1), 3, [False] * 3, None)
