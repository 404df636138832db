"""Every wrong input of the command line: exit code 2, one message that says what to do, nothing written."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runner import Ran, cli, process, tree
from safetensors.torch import load_file, save_file
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

import llmprune
from llmprune.methods import describe

DEMO = Path(llmprune.__file__).parent / "demo" / "model"
QUICK = ("--samples", 2, "--seqlen", 32, "--quiet")
TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder that holds a copy of the demo model as `model`; outputs would come beside it."""
    shutil.copytree(DEMO, tmp_path / "model")
    return tmp_path


def refused(work: Path, *arguments: object, says: tuple[str, ...]) -> None:
    """The run must end as the user's mistake: the message has every text of `says`, and `work` stays as it is."""
    before = tree(work)
    _is_refusal(cli(*arguments), says)
    assert tree(work) == before


def prune_refused(work: Path, *options: object, says: tuple[str, ...]) -> None:
    refused(work, "prune", work / "model", "--out", work / "out", *QUICK, *options, says=says)


def half_refused(work: Path, *options: object, says: tuple[str, ...]) -> None:
    prune_refused(work, "--sparsity", 0.5, *options, says=says)


def _is_refusal(ran: Ran, says: tuple[str, ...]) -> None:
    assert ran.code == 2, ran.err
    assert ran.out == ""
    assert ran.err.startswith("error: ") and ran.err.count("error:") == 1, ran.err
    assert "Traceback" not in ran.err
    for text in says:
        assert text in ran.err


def save(model: PreTrainedModel, work: Path) -> None:
    """Put another architecture in the place of the demo model; the tokenizer stays."""
    (work / "model" / "config.json").unlink()
    (work / "model" / "model.safetensors").unlink()
    model.save_pretrained(work / "model")


def edit_config(work: Path, **changes: object) -> None:
    path = work / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(work: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = work / "model" / "model.safetensors"
    state = load_file(path)
    change(state)
    path.unlink()
    save_file(state, path, metadata={"format": "pt"})


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


# The amount, the method and the recipe.


@pytest.mark.parametrize("value", ["1.0", "-0.1", "nan", "50", "inf", "-inf"])
def test_sparsity_outside_its_range(work: Path, value: str) -> None:
    prune_refused(work, "--sparsity", value, says=(f"sparsity {float(value)}", "[0, 1)", "fraction"))


def test_sparsity_of_an_override_outside_its_range(work: Path) -> None:
    override = "overrides=[{targets: q_proj, sparsity: 1.5}]"
    half_refused(work, "--set", override, says=("sparsity 1.5", "[0, 1)"))


def test_no_amount(work: Path) -> None:
    prune_refused(work, says=("how much", "sparsity", "2:4"))


def test_two_amounts(work: Path) -> None:
    half_refused(work, "--pattern", "2:4", says=("either sparsity or a pattern", "2:4"))


@pytest.mark.parametrize("pattern", ["2:5", "1:3", "7:128"])
def test_pattern_that_does_not_divide_the_inputs(work: Path, pattern: str) -> None:
    says = (f"pattern {pattern}", "64 inputs", "model.layers.0.self_attn.q_proj.weight", "--ignore")
    prune_refused(work, "--pattern", pattern, says=says)


def test_pattern_that_does_not_divide_one_matrix(work: Path) -> None:
    says = ("pattern 4:8", "172 inputs", "model.layers.0.mlp.down_proj.weight", "--ignore")
    prune_refused(work, "--pattern", "4:8", says=says)
    ran = cli("prune", work / "model", "--out", work / "out", "--pattern", "4:8", "--ignore", "down_proj", *QUICK)
    assert ran.code == 0, ran.err


@pytest.mark.parametrize("pattern", ["4:2", "0:4", "2-4", "two:four", "2:4:8", "", 5000 * "9" + ":4"])
def test_pattern_that_is_none(work: Path, pattern: str) -> None:
    prune_refused(work, "--pattern", pattern, says=(f"pattern {pattern!r}",))


@pytest.mark.parametrize(
    ("typed", "meant"), [("sparsegtp", "sparsegpt"), ("wandaa", "wanda"), ("magnitud", "magnitude")]
)
def test_unknown_method(work: Path, typed: str, meant: str) -> None:
    half_refused(work, "--method", typed, says=(f"unknown method {typed!r}", f"did you mean {meant!r}?"))


def test_unknown_allocation(work: Path) -> None:
    half_refused(work, "--allocation", "globall", says=("unknown allocation 'globall'", "did you mean 'global'?"))


@pytest.mark.parametrize(
    ("text", "key", "meant"),
    [
        ("sparsety: 0.5", "sparsety", "sparsity"),
        ("sparsity: 0.5\ncalibration: {sampels: 3}", "calibration.sampels", "samples"),
        ("sparsity: 0.5\nengine: {schedul: layer}", "engine.schedul", "schedule"),
        ("sparsity: 0.5\noverrides: [{targets: q_proj, sparcity: 0.1}]", "overrides.0.sparcity", "sparsity"),
    ],
)
def test_unknown_recipe_key(work: Path, text: str, key: str, meant: str) -> None:
    (work / "r.yaml").write_text(text)
    says = (f"unknown recipe key {key!r}", f"did you mean {meant!r}?")
    prune_refused(work, "--recipe", work / "r.yaml", says=says)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("dampign=0.1", ("no option 'dampign'", "did you mean 'damping'?")),
        ("calibration.sampels=3", ("unknown recipe key 'calibration.sampels'", "did you mean 'samples'?")),
        ("engin.schedule=layer", ("unknown recipe key 'engin'", "did you mean 'engine'?")),
        ("damping=lots", ("damping='lots'", "'sparsegpt'", "must be a float")),
        ("block=1.5", ("block=1.5", "must be a int")),
        ("block=true", ("block=True", "must be a int")),
        ("damping=7", ("damping 7", "at most 1")),
        ("calibration.samples=many", ("'calibration.samples'", "'many'")),
        ("calibration.samples=0", ("'calibration.samples'", "got 0")),
        ("seed=-1", ("'seed'", "got -1")),
        (f"seed={2**64}", ("'seed'", f"got {2**64}")),
        ("seed.deep=3", ("'seed'",)),
        ("nothing", ("--set 'nothing'", "KEY=VALUE")),
        ("=3", ("--set '=3'", "KEY=VALUE")),
        ("damping=[", ("--set 'damping=['", "not understood")),
        ("out=elsewhere", ("--set 'out=elsewhere'", "no recipe key")),
        ("tokenizer=other", ("--set 'tokenizer=other'", "no recipe key")),
    ],
)
def test_wrong_setting(work: Path, setting: str, says: tuple[str, ...]) -> None:
    half_refused(work, "--method", "sparsegpt", "--set", setting, says=says)


def test_option_of_another_method(work: Path) -> None:
    half_refused(work, "--method", "wanda", "--set", "damping=0.1", says=("'wanda'", "no option 'damping'"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"sparsity: [", ("is not valid YAML",)),
        (b"sparsity: 0.5\n\tmethod: wanda", ("is not valid YAML",)),
        (b"\xff\xfe\x00", ("is not valid YAML",)),
        (b"- sparsity", ("must be a mapping",)),
        (b"", ("must be a mapping",)),
    ],
)
def test_unreadable_recipe(work: Path, text: bytes, says: tuple[str, ...]) -> None:
    (work / "r.yaml").write_bytes(text)
    prune_refused(work, "--recipe", work / "r.yaml", says=(str(work / "r.yaml"), *says))


def test_missing_recipe(work: Path) -> None:
    half_refused(work, "--recipe", work / "r.yaml", says=(str(work / "r.yaml"), "cannot be read", "No such file"))


def test_recipe_with_empty_sections_is_accepted(work: Path) -> None:
    (work / "r.yaml").write_text("sparsity: 0.5\noptions:\ncalibration:\n")
    settings = ("--set", "damping=1e-2", "--set", "calibration.source=demo")
    ran = cli("prune", work / "model", "--out", work / "out", "--recipe", work / "r.yaml", *settings, *QUICK, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["recipe"]["options"] == {"damping": 0.01}


# Which matrices.


@pytest.mark.parametrize("option", ["--targets", "--ignore"])
@pytest.mark.parametrize("pattern", ["nope_proj", "*.nope.*", "re:.*nope", "q_proj,nope_proj", "layers.7"])
def test_pattern_that_matches_nothing(work: Path, option: str, pattern: str) -> None:
    missed = pattern.split(",")[-1]
    says = (option.strip("-s"), repr(missed), "matches no matrix", "model.layers.0.self_attn.q_proj.weight")
    half_refused(work, option, pattern, says=says)


def test_override_that_matches_nothing(work: Path) -> None:
    half_refused(work, "--set", "overrides=[{targets: nope, sparsity: 0.1}]", says=("override", "'nope'", "q_proj"))


@pytest.mark.parametrize("option", [("--targets", "re:(("), ("--ignore", "re:[")])
def test_bad_regular_expression(work: Path, option: tuple[str, str]) -> None:
    half_refused(work, *option, says=(repr(option[1]), "not a valid regular expression"))


def test_bad_regular_expression_in_an_override(work: Path) -> None:
    override = "overrides=[{targets: 're:((', sparsity: 0.1}]"
    half_refused(work, "--set", override, says=("'re:(('", "not a valid regular expression"))


def test_everything_ignored(work: Path) -> None:
    half_refused(work, "--ignore", "layers", says=("leave nothing to prune",))


@pytest.mark.parametrize("target", ["lm_head", "lm_head.weight", "re:lm_.*"])
def test_tied_head(work: Path, target: str) -> None:
    half_refused(work, "--targets", target, says=(repr(target), "lm_head.weight", "embedding", "tied"))


# Text.


def test_calibration_text_too_short(work: Path) -> None:
    text = work / "short.txt"
    text.write_text("Once upon a time")
    from transformers import AutoTokenizer

    have = len(AutoTokenizer.from_pretrained(DEMO)("Once upon a time", add_special_tokens=False).input_ids)
    # a window of 100 tokens begins with BOS, so 99 must come from the text
    says = (f"has {have} tokens", f"{99 - have} too few", "sequence of 100", "--seqlen", str(text))
    half_refused(work, "--calibration", f"file:{text}", "--seqlen", 100, says=says)
    refused(
        work,
        *("eval", work / "model", "--perplexity", f"file:{text}", "--seqlen", 100),
        says=(f"has {have} tokens", f"{99 - have} too few", "window of 100"),
    )


@pytest.mark.parametrize("spec", ["wikitext", "c5", "file:", "hub:", ""])
def test_text_that_is_no_spec(work: Path, spec: str) -> None:
    half_refused(work, "--calibration", spec, says=(f"text {spec!r} is not understood", "file:PATH", "wikitext2"))


def test_text_that_is_a_path(work: Path) -> None:
    text = work / "text.txt"
    text.write_text("abc")
    half_refused(work, "--calibration", text, says=(f"write file:{text}",))


def test_text_file_that_does_not_exist(work: Path) -> None:
    half_refused(work, "--calibration", f"file:{work}/no.txt", says=("there is no text file", f"{work}/no.txt"))


# The output.


def test_output_exists(work: Path) -> None:
    shutil.copytree(DEMO, work / "out")
    half_refused(work, says=(str(work / "out"), "exists", "--overwrite"))


def test_output_exists_and_is_no_model(work: Path) -> None:
    (work / "out").mkdir()
    (work / "out" / "thesis.txt").write_text("ten years of work")
    half_refused(work, "--overwrite", says=(str(work / "out"), "other than a model"))


def test_output_is_a_file(work: Path) -> None:
    (work / "out").write_text("notes")
    half_refused(work, says=(str(work / "out"), "exists"))
    half_refused(work, "--overwrite", says=(str(work / "out"), "other than a model"))


def test_output_below_a_file(work: Path) -> None:
    (work / "notes").write_text("a file")
    run = ("prune", work / "model", "--out", work / "notes" / "out", "--sparsity", 0.5, *QUICK)
    refused(work, *run, says=(str(work / "notes"), "cannot be written to", "--out"))


@pytest.mark.parametrize("where", ["model", "model/out", "model/deep/out", "model/../model"])
def test_output_in_the_input(work: Path, where: str) -> None:
    for options in ((), ("--overwrite",), ("--resume",)):
        run = ("prune", work / "model", "--out", work / where, "--sparsity", 0.5, *options, *QUICK)
        refused(work, *run, says=("lies in the input folder",))


def test_output_in_the_input_by_a_link(work: Path) -> None:
    (work / "link").symlink_to(work / "model")
    out = work / "link" / "out"
    refused(
        work,
        *("prune", work / "model", "--out", out, "--sparsity", 0.5, "--overwrite", *QUICK),
        says=("lies in the input folder",),
    )


@pytest.mark.parametrize("name", ["out/model", "out.partial", "out.partial/model"])
def test_input_that_the_output_would_remove(work: Path, name: str) -> None:
    (work / name).parent.mkdir(exist_ok=True)
    (work / "model").rename(work / name)
    for option in ("--overwrite", "--resume"):
        run = ("prune", work / name, "--out", work / "out", "--sparsity", 0.5, option, *QUICK)
        refused(work, *run, says=("the input",))


@pytest.mark.parametrize("out", [".", "/"])
def test_output_without_a_name(work: Path, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (work / "here").mkdir()
    (work / "here" / "notes.txt").write_text("mine")
    monkeypatch.chdir(work / "here")
    for options in ((), ("--overwrite",)):
        run = ("prune", DEMO, "--out", out, "--sparsity", 0.5, *options, *QUICK)
        refused(work, *run, says=())


def test_no_output_and_no_model(work: Path) -> None:
    refused(work, "prune", work / "model", "--sparsity", 0.5, says=("where the pruned model goes",))
    refused(work, "prune", "--out", work / "out", "--sparsity", 0.5, says=("name the model",))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--device", "quantum"), ("device 'quantum'",)),
        (("--dtype", "int8"), ("'engine.dtype'", "'int8'", "bfloat16")),
        (("--schedule", "backwards"), ("'engine.schedule'", "'backwards'")),
        (("--batch-size", 0), ("'engine.batch_size'", "got 0")),
        (("--seqlen", 1), ("'calibration.seqlen'", "got 1")),
    ],
)
def test_wrong_option(work: Path, options: tuple[object, ...], says: tuple[str, ...]) -> None:
    run = ("prune", work / "model", "--out", work / "out", "--sparsity", 0.5, "--quiet", *options)
    refused(work, *run, says=says)


def test_global_allocation_of_a_pattern(work: Path) -> None:
    says = ("allocation 'global'", "2:4")
    prune_refused(work, "--pattern", "2:4", "--allocation", "global", "--method", "magnitude", says=says)


# Measuring.


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), ("what to measure",)),
        (("--perplexity", "demo", "--seqlen", 1), ("seqlen 1", "at least 2")),
        (("--perplexity", "demo", "--seqlen", 0), ("seqlen 0", "at least 2")),
        (("--perplexity", "demo", "--max-windows", 0), ("max_windows 0", "at least 1")),
        (("--perplexity", "demo", "--max-windows", -1), ("max_windows -1", "at least 1")),
        (("--perplexity", "demo", "--batch-size", 0), ("batch_size 0", "at least 1")),
        (("--perplexity", "demo", "--seqlen", 32, "--stride", 0), ("stride 0", "at least 1")),
        (("--perplexity", "demo", "--seqlen", 32, "--stride", 33), ("stride 33", "32")),
        (("--perplexity", "demo", "--dtype", "int32"), ("dtype 'int32'", "bfloat16")),
        (("--perplexity", "demo", "--dtype", "nn"), ("dtype 'nn'", "bfloat16")),
        (("--perplexity", "nothing"), ("'nothing'", "not understood")),
        (("--perplexity", "demo", "--out", "no/such/folder/x.json"), ("--out no/such/folder/x.json", "folder")),
        (("--perplexity", "demo", "--out", "."), ("--out .", "must be a file")),
    ],
)
def test_wrong_measurement(
    work: Path, options: tuple[object, ...], says: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    refused(work, "eval", work / "model", *options, says=says)


def test_measurement_of_a_damaged_model(work: Path) -> None:
    edit_weights(work, lambda state: state["model.norm.weight"].fill_(float("nan")))
    run = ("eval", work / "model", "--perplexity", "demo", "--max-windows", 1)
    refused(work, *run, says=("NaN or infinity", "'demo'"))


def test_measurement_of_an_incomplete_model(work: Path) -> None:
    # transformers would fill the gap with random numbers
    name = "model.layers.3.mlp.up_proj.weight"
    edit_weights(work, lambda state: state.pop(name))
    run = ("eval", work / "model", "--perplexity", "demo", "--max-windows", 1)
    refused(work, *run, says=(str(work / "model"), "lacks the tensor", name))


def test_measurement_of_weights_that_do_not_fit(work: Path) -> None:
    edit_config(work, intermediate_size=176)
    run = ("eval", work / "model", "--perplexity", "demo", "--max-windows", 1)
    refused(work, *run, says=(str(work / "model"), "do not fit its configuration"))


def test_inspection_of_nothing(work: Path) -> None:
    refused(work, "inspect", work / "nowhere", says=("there is no folder",))


# What typer itself refuses.


@pytest.mark.parametrize(
    "arguments",
    [("prunee",), ("prune", "m", "--sparsity", "half"), ("prune", "m", "--no-such-option"), ("eval",)],
)
def test_usage_errors(work: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    before = tree(work)
    ran = cli(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert "Usage" in ran.err and "Traceback" not in ran.err
    assert tree(work) == before


# One JSON document on stdout, and whole processes.


def test_json_is_all_there_is_on_stdout(work: Path) -> None:
    model, out = work / "model", work / "out"
    run = ("prune", model, "--out", out, "--sparsity", 0.5, "--samples", 2, "--seqlen", 32, "--json")
    for arguments in (
        (*run, "--dry-run"),
        run,
        (*run, "--resume"),
        ("inspect", out, "--json"),
        ("methods", "--json"),
        ("eval", out, "--perplexity", "demo", "--seqlen", 64, "--max-windows", 2, "--json"),
    ):
        ran = cli(*arguments)
        assert ran.code == 0, ran.err
        json.loads(ran.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_methods_by_their_whole_names_and_options() -> None:
    listed = cli("methods").out
    for row in describe():
        assert f" {row['name']} " in listed
    ran = cli("methods", "sparsegpt")
    (row,) = (row for row in describe() if row["name"] == "sparsegpt")
    options = {f"--set {key}={json.dumps(value)}" for key, value in row["options"].items()}
    assert ran.code == 0 and options == {line for line in ran.out.splitlines() if line.startswith("--set")} != set()
    assert "`damping`: fraction of the mean" in ran.out
    assert "--set retarget=0.75" in cli("methods", "auto").out
    _is_refusal(cli("methods", "sparsegtp"), ("did you mean 'sparsegpt'?",))


def test_a_process_that_fails(work: Path) -> None:
    before = tree(work)
    ran = process("prune", work / "model", "--out", work / "out", "--sparsity", 0.5, "--method", "sparsegtp", "--json")
    _is_refusal(ran, ("unknown method 'sparsegtp'", "did you mean 'sparsegpt'?"))
    assert len(ran.err.splitlines()) == 1
    assert tree(work) == before


def test_a_process_that_succeeds(work: Path) -> None:
    run = ("prune", work / "model", "--out", work / "out", "--sparsity", 0.5, "--samples", 2, "--seqlen", 32, "--json")
    ran = process(*run)
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert report == json.loads((work / "out" / "llmprune.json").read_text())
    assert "model.layers.4.mlp.down_proj.weight" in ran.err
    assert yaml.safe_load(yaml.safe_dump(report["recipe"]))["sparsity"] == 0.5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--sparsity", 50), ("sparsity 50.0", "0.5 for 50 %")),
        (("--ratio", 20), ("ratio 20.0", "0.2 for 20 %")),
        (("--ratio", 0.2, "--params", "5e5"), ("either ratio or params, not both",)),
        (("--drop-layers", "two"), ("'drop_layers'", "'two'")),
        (("--set", "calibration.samples=[1]", "--sparsity", 0.5), ("'calibration.samples'", "valid integer", "[1]")),
        (("--set", "engine=module", "--sparsity", 0.5), ("'engine' is a section", "schedule", "'module'")),
        (("--method", "besa", "--pattern", "2:4"), ("'besa' has no N:M patterns",)),
    ],
)
def test_wrong_amounts_and_sections(work: Path, options: tuple[object, ...], says: tuple[str, ...]) -> None:
    prune_refused(work, *options, says=says)


def test_a_recipe_that_names_its_text_where_a_section_belongs(work: Path) -> None:
    (work / "recipe.yaml").write_text("sparsity: 0.5\ncalibration: demo\n")
    run = ("prune", work / "model", "--out", work / "out", "--recipe", work / "recipe.yaml")
    refused(work, *run, says=("'calibration' is a section", "source", "'demo'"))
    refused(work, *run, "--samples", 2, says=("'calibration.samples'", "'calibration' is 'demo'"))


def test_the_option_is_named_where_the_output_is_missing(work: Path) -> None:
    refused(work, "prune", work / "model", "--sparsity", 0.5, says=("--out FOLDER",))


def test_a_text_that_is_not_utf_8(work: Path) -> None:
    (work / "text.txt").write_bytes("caf\xe9 ".encode("latin-1") * 999)
    half_refused(work, "--calibration", f"file:{work / 'text.txt'}", says=("text.txt", "not UTF-8", "iconv"))


def test_an_evaluation_text_that_is_too_short_says_what_helps(work: Path) -> None:
    (work / "text.txt").write_text("Once upon a time")
    evaluation = ("eval", work / "model", "--perplexity", f"file:{work / 'text.txt'}", "--seqlen", 256)
    refused(work, *evaluation, says=("give more text, or a smaller --seqlen",))


def test_a_near_miss_is_answered_without_the_whole_list(work: Path) -> None:
    ran = cli("prune", work / "model", "--out", work / "out", "--sparsity", 0.5, "--method", "sparsegp")
    assert ran.err.strip() == "error: unknown method 'sparsegp'; did you mean 'sparsegpt'?"
    ran = cli("prune", work / "model", "--out", work / "out", "--sparsity", 0.5, "--method", "qqqqqq")
    assert "known: activation, " in ran.err


def test_an_output_folder_that_cannot_be_made(work: Path) -> None:
    # no folder can be made in /proc, whoever asks
    run = ("prune", work / "model", "--out", "/proc/out", "--method", "magnitude", "--sparsity", 0.5)
    refused(work, *run, says=("/proc/out", "cannot be written to", "--out"))


def test_version() -> None:
    assert cli("--version").out == f"llmprune {llmprune.__version__}\n"


def test_methods_fit_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    listed = cli("methods").out
    assert "…" not in listed and max(map(len, listed.splitlines())) <= 80
    for row in describe():
        assert row["name"] in listed
        assert row["paper"] in listed or " " in row["paper"]
    kinds = [line.split("│")[2].strip() for line in listed.splitlines() if line.startswith("│")]
    kinds = [kind for kind in kinds if kind]
    assert kinds == sorted(kinds, key=["weight", "width", "depth", "expert"].index)


@pytest.mark.parametrize("model", [None, 3, LlamaConfig(), torch.nn.Linear(4, 4)])
def test_what_is_no_model(model: Any) -> None:
    with pytest.raises(llmprune.UserError, match="must be a folder, a Hub id or a loaded model"):
        llmprune.prune(model, sparsity=0.5, out="out")


def test_a_path_is_no_calibration_text() -> None:
    with pytest.raises(llmprune.UserError, match=r"text\.txt.*in quotes"):
        llmprune.prune(DEMO, method="wanda", sparsity=0.5, calibration=Path("text.txt"), dry_run=True)


def test_a_misspelt_key_in_python_is_recognised() -> None:
    with pytest.raises(llmprune.UserError, match=r"'sparcity'; did you mean 'sparsity'\?"):
        llmprune.prune(DEMO, method="magnitude", sparcity=0.5, dry_run=True)


def test_a_result_in_a_few_words_and_without_a_tokenizer() -> None:
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    result = llmprune.prune(model, method="magnitude", sparsity=0.5)
    assert len(repr(result)) < 200 and f"'zeros': {result.report['totals']['zeros']}" in repr(result)
    with pytest.raises(llmprune.UserError, match="pass tokenizer="):
        _ = result.tokenizer


def test_the_public_names_are_listed() -> None:
    assert {"prune", "recover", "evaluate", "load"} <= set(dir(llmprune))
