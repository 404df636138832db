"""Model folders that are wrong."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import QUICK, edit_config, edit_weights, half_refused, refused
from runner import cli
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    dynamic_module_utils,
)

TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def save(model: PreTrainedModel, work: Path) -> None:
    """Put another architecture in the place of the demo model; the tokenizer stays."""
    (work / "model" / "config.json").unlink()
    (work / "model" / "model.safetensors").unlink()
    model.save_pretrained(work / "model")


def test_the_unchanged_demo_model_is_accepted(work: Path) -> None:
    # else every refusal below could have one and the same wrong reason
    ran = cli("prune", work / "model", "--out", work / "out", "--sparsity", 0.5, *QUICK)
    assert ran.code == 0, ran.err
    assert (work / "out" / "model.safetensors").is_file()


# The model.


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "nowhere", "~/no/such/folder"])
def test_path_that_does_not_exist(work: Path, name: str) -> None:
    refused(work, "prune", name, "--out", work / "out", "--sparsity", 0.5, says=("there is no folder", name))


def test_hub_model_that_cannot_be_had(work: Path) -> None:
    says = ("'nobody/has-this-model'", "neither a folder nor a model that the Hub gives us")
    refused(work, "prune", "nobody/has-this-model", "--out", work / "out", "--sparsity", 0.5, says=says)


def test_file_instead_of_a_folder(work: Path) -> None:
    path = work / "model" / "model.safetensors"
    says = (str(path), "is a file", "give the folder")
    refused(work, "prune", path, "--out", work / "out", "--sparsity", 0.5, says=says)


def test_folder_without_config(work: Path) -> None:
    (work / "model" / "config.json").unlink()
    half_refused(work, says=(str(work / "model"), "no config.json"))


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "no-such-architecture"}'])
def test_unreadable_config(work: Path, text: str) -> None:
    (work / "model" / "config.json").write_text(text)
    half_refused(work, says=(str(work / "model"), "configuration", "cannot be read"))


def test_folder_without_weights(work: Path) -> None:
    (work / "model" / "model.safetensors").unlink()
    half_refused(work, says=("holds no weights", "model.safetensors"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickle_checkpoint(work: Path, name: str) -> None:
    (work / "model" / "model.safetensors").unlink()
    torch.save({}, work / "model" / name)
    half_refused(work, says=("pickle", name, "Convert it", "save_pretrained"))


def test_encoder_only_model(work: Path) -> None:
    save(BertForMaskedLM(BertConfig(**TINY)), work)
    half_refused(work, says=(str(work / "model"), "encoder-only", "bert", "decoder-only"))


def test_encoder_decoder_model(work: Path) -> None:
    config = T5Config(vocab_size=512, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    save(T5ForConditionalGeneration(config), work)
    half_refused(work, says=(str(work / "model"), "encoder-decoder", "t5", "decoder-only"))


def test_vision_model(work: Path) -> None:
    sizes = {key: TINY[key] for key in TINY if key != "vocab_size"}
    save(ViTModel(ViTConfig(**sizes, image_size=16, patch_size=4)), work)
    half_refused(work, says=("'vit'", "no causal language model"))


def test_classifier(work: Path) -> None:
    save(LlamaForSequenceClassification(LlamaConfig(**TINY, pad_token_id=0)), work)
    half_refused(work, says=("LlamaForSequenceClassification", "not a causal language model"))


@pytest.mark.parametrize("method", ["gptq", "fp8", "mxfp4", "bitsandbytes"])
def test_quantized_checkpoint(work: Path, method: str) -> None:
    edit_config(work, quantization_config={"quant_method": method})
    half_refused(work, says=("quantized", method, "dequantize"))


def test_truncated_safetensors(work: Path) -> None:
    path = work / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    half_refused(work, says=(str(path), "truncated", "download it again"))


@pytest.mark.parametrize("content", [b"", b"\0\1\2", b"not safetensors at all" * 100, b"<html>404</html>"])
def test_garbage_safetensors(work: Path, content: bytes) -> None:
    path = work / "model" / "model.safetensors"
    path.write_bytes(content)
    half_refused(work, says=(str(path), "corrupted", "download it again"))


def test_truncated_shard(work: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    save(model, work)
    (work / "model" / "model.safetensors").unlink()
    model.save_pretrained(work / "model", max_shard_size="20KB")
    shard = max((work / "model").glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8])
    half_refused(work, says=(str(shard), "truncated", "download it again"))


@pytest.mark.parametrize("name", ["../x.safetensors", "/tmp/x.safetensors", "a/../../x.safetensors", 7])
def test_index_that_names_a_file_outside_its_folder(work: Path, name: object) -> None:
    # the file is there, and is what the model needs: only its place is wrong
    shutil.copy(work / "model" / "model.safetensors", work / "x.safetensors")
    index = work / "model" / "model.safetensors.index.json"
    names = load_file(work / "x.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))
    half_refused(work, says=(str(index), repr(name), "outside its folder", "refused"))


def test_index_that_names_a_missing_file(work: Path) -> None:
    index = work / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    half_refused(work, says=(str(index), "'model-00001-of-00001.safetensors'", "missing", "download"))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_index_that_is_none(work: Path, text: str) -> None:
    index = work / "model" / "model.safetensors.index.json"
    index.write_text(text)
    half_refused(work, says=(str(index), "is not a safetensors index"))


@pytest.mark.parametrize(
    "name", ["model.layers.3.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_missing_tensor(work: Path, name: str) -> None:
    edit_weights(work, lambda state: state.pop(name))
    half_refused(work, says=(str(work / "model"), "lacks the tensor", name))


def test_weights_that_do_not_fit_the_configuration(work: Path) -> None:
    edit_config(work, intermediate_size=176)
    half_refused(work, says=("does not fit", "model.layers.0.mlp."))


@pytest.mark.parametrize("change", [{"hidden_size": "wide"}, {"num_hidden_layers": None}])
def test_configuration_of_wrong_types(work: Path, change: dict[str, object]) -> None:
    edit_config(work, **change)
    half_refused(work, says=(str(work / "model"), "configuration", next(iter(change))))


def test_missing_tokenizer(work: Path) -> None:
    for path in (work / "model").glob("tokenizer*"):
        path.unlink()
    half_refused(work, says=(str(work / "model"), "no usable tokenizer", "put its files there"))


def test_missing_tokenizer_does_not_matter_without_text(work: Path) -> None:
    for path in (work / "model").glob("tokenizer*"):
        path.unlink()
    assert cli("prune", work / "model", "--out", work / "out", "--sparsity", 0.5, "--method", "magnitude").code == 0


def test_token_ids_beyond_the_vocabulary(work: Path) -> None:
    edit_config(work, vocab_size=300)
    name = "model.embed_tokens.weight"
    edit_weights(work, lambda state: state.update({name: state[name][:300].clone()}))
    half_refused(work, says=("holds the token", "only 300", "tokenizer does not belong"))
    text = work / "long.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    says = ("holds the token", "only 300", "tokenizer does not belong")
    refused(work, "eval", work / "model", "--perplexity", f"file:{text}", "--seqlen", 32, says=says)


REMOTE_CONFIG = """
from transformers import LlamaConfig

class TinyRemoteConfig(LlamaConfig):
    model_type = "tiny_remote"
"""
REMOTE_MODEL = """
from transformers import LlamaForCausalLM
from .configuration_tiny_remote import TinyRemoteConfig

class TinyRemoteForCausalLM(LlamaForCausalLM):
    config_class = TinyRemoteConfig
"""


def test_remote_code_needs_a_word_from_the_user(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers copies modelling code to a cache of its own and imports it from there: another one than other tests use
    used = dynamic_module_utils.HF_MODULES_CACHE
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(work.parent / "modules"))
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one != str(used)])
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)
    edit_config(
        work,
        model_type="tiny_remote",
        architectures=["TinyRemoteForCausalLM"],
        auto_map={
            "AutoConfig": "configuration_tiny_remote.TinyRemoteConfig",
            "AutoModelForCausalLM": "modeling_tiny_remote.TinyRemoteForCausalLM",
        },
    )
    (work / "model" / "configuration_tiny_remote.py").write_text(REMOTE_CONFIG)
    (work / "model" / "modeling_tiny_remote.py").write_text(REMOTE_MODEL)
    half_refused(work, says=(str(work / "model"), "its own modelling code", "--trust-remote-code"))
    run = ("prune", work / "model", "--out", work / "out", "--sparsity", 0.5, *QUICK)
    ran = cli(*run, "--trust-remote-code")
    assert ran.code == 0, ran.err
    assert (work / "out" / "modeling_tiny_remote.py").read_text() == REMOTE_MODEL
