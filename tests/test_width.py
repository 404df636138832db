"""Width pruning from recipe to checkpoint: what is written loads plainly and is the model that was decided on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import runner
import tiny
import torch
from families import MORE
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import llmprune
from llmprune.methods import METHODS, method_class
from llmprune.methods.width import sequential
from llmprune.types import UserError

TEXT = [row.tolist() for row in tiny.tokens(6, 20, seed=3)]
NAMES = [name for name in METHODS if method_class(name).kind == "width"]
OPTIONS: dict[str, Any] = {"bonsai": {"masks": 6}}


@pytest.fixture(autouse=True)
def families(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, config in MORE.items():
        monkeypatch.setitem(tiny.TINY, name, config)


def prune(model: Any, method: str, **settings: Any) -> llmprune.Result:
    options = {**OPTIONS.get(method, {}), **settings.pop("options", {})}
    return llmprune.prune(model, method=method, calibration=TEXT, options=options, **settings)


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=tiny.tokens(2, 12), use_cache=False).logits
    return found


@pytest.mark.parametrize("method", NAMES)
def test_every_method_writes_a_plain_smaller_model(method: str, tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "dense")
    settings: dict[str, Any] = {"ratio": 0.3, "engine": {"batch_size": 2}}
    if method == "flap":  # the class that stands in for this number of heads takes no biases
        settings["width"] = {"units": ["channel"]}
    report = prune(source, method, out=tmp_path / "out", **settings).report
    assert report["verified"].startswith("reloaded; logits equal")
    small = load(tmp_path / "out")
    count = sum(one.numel() for one in small.parameters())
    layers = sum(one.numel() for one in tiny.build("llama").model.layers.parameters())
    assert count == report["totals"]["params_after"] <= report["totals"]["params_before"] - 0.3 * layers
    # the model in memory ends as the same model
    resident = prune(tiny.build("llama"), method, **settings)
    assert float((logits(resident.model) - logits(small)).abs().max()) <= 1e-5


HIDDEN = [("minitron", ["channel", "residual"]), ("llm-pruner", ["residual"]), ("group-magnitude", ["residual"])]


@pytest.mark.parametrize(("method", "units"), [*HIDDEN, ("random-units", ["kv-group", "channel", "residual"])])
def test_one_set_of_hidden_dimensions_for_the_whole_model(method: str, units: list[str], tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "dense")
    settings: dict[str, Any] = {"ratio": 0.3, "width": {"units": units, "round_to": 2}, "engine": {"batch_size": 2}}
    report = prune(source, method, out=tmp_path / "out", **settings).report
    assert report["verified"].startswith("reloaded; logits equal")
    small = load(tmp_path / "out")
    layers = [sum(one.numel() for one in model.model.layers.parameters()) for model in (small, tiny.build("llama"))]
    assert layers[0] <= 0.7 * layers[1]
    (hidden,) = report["structure"]["widths"]["residual"]
    assert small.config.hidden_size == hidden < 32 and small.config.head_dim == 4
    count = sum(one.numel() for one in small.parameters())
    assert count == report["totals"]["params_after"]
    resident = prune(tiny.build("llama"), method, **settings)
    assert float((logits(resident.model) - logits(small)).abs().max()) <= 1e-5
    ids = tiny.tokens(1, 8)
    cached, plain = (small.generate(ids, max_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)


def test_hidden_dimensions_that_cannot_go_are_refused() -> None:
    cases: list[tuple[str, str, dict[str, Any], str]] = [
        ("llama", "group-obs", {}, "no scores for dimensions of the hidden state"),
        ("llama", "minitron", {"options": {"compensate": "least-squares"}}, "nothing makes up for them"),
        ("gemma2", "minitron", {}, "no plain class holds a Gemma2ForCausalLM"),
        ("olmoe", "minitron", {}, "no hidden size of a OlmoeForCausalLM"),
        ("llama", "minitron", {"layout": "remote-code"}, "leave the layout plain"),
        ("llama", "minitron", {"ratio": 0.9}, "ask for less"),
    ]
    for name, method, settings, message in cases:
        with pytest.raises(UserError, match=message):
            prune(tiny.build(name), method, **{"ratio": 0.2, "width": {"units": ["residual"]}, **settings})


@pytest.mark.parametrize("options", [{"compensate": "least-squares"}, {"uniqueness": "gum"}])
def test_options_of_every_score(options: dict[str, Any], tmp_path: Path) -> None:
    for method in ("wanda-sp", "llm-pruner", "random-units", "mini-gpts"):
        result = prune(tiny.build("llama"), method, ratio=0.3, options=options)
        plain = prune(tiny.build("llama"), method, ratio=0.3)
        assert float((logits(result.model) - logits(plain.model)).abs().max()) > 1e-4
        with pytest.raises(UserError, match="is none of"):
            prune(tiny.build("llama"), method, ratio=0.3, options=dict.fromkeys(options, "both"))


def test_the_dense_stream_is_what_the_dense_model_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics of `stream=dense` are those of one plain forward through the dense model."""
    seen: dict[str, torch.Tensor] = {}
    model = tiny.build("qwen2")
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].flatten(0, 1)))
    logits_of = model(input_ids=torch.tensor(TEXT), use_cache=False).logits
    assert logits_of.isfinite().all()
    expected = {name: (one.T @ one).double() for name, one in seen.items()}
    found: dict[str, torch.Tensor] = {}
    real = sequential.fold

    def spy(weight_OI: torch.Tensor, system_II: torch.Tensor, gone_I: torch.Tensor) -> torch.Tensor:
        found[list(expected)[len(found)]] = system_II
        return real(weight_OI, system_II, gone_I)

    monkeypatch.setattr(sequential, "fold", spy)
    prune(tiny.build("qwen2"), "group-obs", ratio=0.3, options={"stream": "dense", "damping": 0.0})
    for name, gram_II in expected.items():
        assert float((found[name] - gram_II).abs().max()) <= 1e-4 * float(gram_II.abs().max()), name


def test_aimed_at_the_dense_outputs_the_writer_is_the_least_squares_map_to_them() -> None:
    """Without damping, what stays of the second layer's down maps its inputs in the pruned model to dense outputs."""

    def at_down(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
        seen: list[torch.Tensor] = []
        down = model.model.layers[1].mlp.down_proj
        hook = down.register_forward_hook(
            lambda _, args, out: seen.extend([args[0].flatten(0, 1).double(), out.flatten(0, 1).double()])
        )
        with torch.no_grad():
            model(input_ids=torch.tensor(TEXT), use_cache=False)
        hook.remove()
        return seen[0], seen[1]

    _, dense_TO = at_down(tiny.build("qwen2"))
    options = {"aim": 1.0, "damping": 1e-7}
    settings: dict[str, Any] = {"width": {"units": ["channel"], "round_to": 1}, "ratio": 0.2, "options": options}
    result = prune(tiny.build("qwen2"), "group-obs", **settings)
    x_TK, _ = at_down(result.model)
    best_KO = torch.linalg.lstsq(x_TK, dense_TO).solution
    found_OK = result.model.model.layers[1].mlp.down_proj.weight.detach()
    assert float((found_OK - best_KO.T).abs().max()) <= 1e-3 * float(best_KO.abs().max())


FAMILIES = ["llama", "qwen3", "gemma2", "phi3", "olmo2", "gpt2", "opt", "gpt-neox", "falcon-new", "glm", "phi"]


@pytest.mark.parametrize("name", [*FAMILIES, "mixtral", "qwen3-moe", "starcoder2"])
def test_every_layout_from_checkpoint_to_checkpoint(name: str, tmp_path: Path) -> None:
    source = tiny.save(name, tmp_path / "dense", shards=True)
    report = prune(source, "group-obs", out=tmp_path / "out", ratio=0.2).report
    assert report["verified"].startswith("reloaded; logits equal")
    assert report["totals"]["params_after"] == sum(one.numel() for one in load(tmp_path / "out").parameters())
    assert report["totals"]["params_after"] < report["totals"]["params_before"]
    assert not report["totals"]["zeros"]


@pytest.mark.parametrize("method", ["group-fisher", "bonsai", "llm-pruner"])
def test_scores_of_a_whole_model_reach_fused_experts(method: str, tmp_path: Path) -> None:
    source = tiny.save("qwen3-moe", tmp_path / "dense")
    report = prune(source, method, out=tmp_path / "out", ratio=0.2, engine={"batch_size": 3}).report
    assert report["verified"].startswith("reloaded; logits equal")
    rows = {row["name"]: row for row in report["structure"]["units"]}
    assert len(rows["model.layers.1 expert-channel"]["kept"]) < 4 * 24
    resident = prune(tiny.build("qwen3-moe"), method, ratio=0.2, engine={"batch_size": 2})
    assert float((logits(resident.model) - logits(load(tmp_path / "out"))).abs().max()) <= 1e-5


def test_reload_in_a_fresh_process_and_generation(tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "dense")
    prune(source, "group-obs", out=tmp_path / "out", ratio=0.3)
    small = load(tmp_path / "out")
    assert small.config.model_type == "mistral"
    ids = tiny.tokens(1, 10)
    code = (
        "import torch; from transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r}).eval()\n"
        f"ids = torch.tensor({ids.tolist()})\n"
        "print([m.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, use_cache=c)"
        ".tolist() for c in (True, False)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    cached, plain = json.loads(done.stdout.strip().splitlines()[-1])
    here = small.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert cached == plain == here.tolist()


def test_flap_with_biases(tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "dense")
    settings: dict[str, Any] = {"width": {"units": ["channel"]}, "ratio": 0.2}
    report = prune(source, "flap", out=tmp_path / "out", **settings).report
    assert report["verified"].startswith("reloaded; logits equal")
    small = load(tmp_path / "out")
    assert (small.config.model_type, small.config.mlp_bias) == ("llama", True)
    assert float(small.model.layers[0].mlp.down_proj.bias.detach().abs().max()) > 0
    assert not small.model.layers[0].mlp.up_proj.bias.detach().any()
    with pytest.raises(UserError, match="set compensate=least-squares"):
        prune(tiny.build("qwen3"), "flap", ratio=0.2)


@pytest.mark.parametrize("allocation", ["rising", "pooled"])
def test_layers_of_unequal_width_are_padded(allocation: str, tmp_path: Path) -> None:
    source = tiny.save("qwen2", tmp_path / "dense")
    result = prune(source, "group-obs", out=tmp_path / "out", ratio=0.3, allocation=allocation)
    report = result.report
    assert report["verified"].startswith("reloaded; logits equal")
    removed = report["totals"]["params_before"] - report["totals"]["params_after"] + report["totals"]["zeros"]
    layers = sum(one.numel() for one in tiny.build("qwen2").model.layers.parameters())
    assert removed >= 0.3 * layers and report["totals"]["zeros"] > 0
    assert "stay as zeros" in report["warnings"][-1]
    assert sum(int((one == 0).sum()) for one in result.model.parameters()) >= report["totals"]["zeros"]


def test_pooled_heads_are_numbers_that_the_class_takes() -> None:
    # a Gemma 2 of hidden size 32 and 8 heads in 4 groups takes no 6 heads, and no other class stands in for it
    for ratio in (0.1, 0.2, 0.3, 0.4):
        result = prune(tiny.build("gemma2"), "wanda-sp", ratio=ratio, allocation="pooled", width={"round_to": 4})
        kept = result.report["structure"]["widths"]
        assert set(kept["kv-group"]) <= {1, 2, 4} and all(one % 4 == 0 for one in kept["channel"])


def test_protected_layers_keep_their_width(tmp_path: Path) -> None:
    source = tiny.save("qwen2", tmp_path / "dense")
    width = {"protect_first": 1, "protect_last": 1}
    report = prune(source, "wanda-sp", out=tmp_path / "out", ratio=0.1, width=width).report
    kept = {row["name"]: len(row["kept"]) for row in report["structure"]["units"]}
    assert kept["model.layers.0 channel"] == kept["model.layers.2 channel"] == 48 > kept["model.layers.1 channel"]


def test_a_model_in_memory_keeps_its_buffers(tmp_path: Path) -> None:
    source = tiny.save("apertus", tmp_path / "dense")
    resident = prune(tiny.build("apertus"), "group-magnitude", ratio=0.3)
    prune(source, "group-magnitude", ratio=0.3, out=tmp_path / "out")
    assert float((logits(resident.model) - logits(load(tmp_path / "out"))).abs().max()) <= 1e-5


def test_experts_keep_sizes_that_their_products_take(tmp_path: Path) -> None:
    source = tiny.save("mixtral", tmp_path / "dense")
    with pytest.raises(UserError, match="round_to=4 gives the products of fused experts sizes"):
        prune(source, "group-magnitude", ratio=0.2, width={"round_to": 4}, out=tmp_path / "out")


def test_a_final_number_of_parameters(tmp_path: Path) -> None:
    source = tiny.save("qwen2", tmp_path / "dense")
    done = runner.cli(
        *("prune", source, "--out", tmp_path / "out", "--method", "group-magnitude", "--params", "30e3"),
        *("--set", "width.round_to=1", "--json", "--quiet"),
    )
    assert done.code == 0, done.err
    after = json.loads(done.out)["totals"]["params_after"]
    # one channel of every layer more would be too much
    assert 30_000 - 3 * 96 < after <= 30_000


def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    cases: list[tuple[str, str, dict[str, Any], str]] = [
        ("bloom", "group-magnitude", {"ratio": 0.2}, "no plain class holds a BloomForCausalLM"),
        ("mamba", "group-magnitude", {"ratio": 0.2}, "'mamba' model are heads and channels is not known"),
        ("llama", "group-magnitude", {"ratio": 1.2}, "must lie between 0 and 1"),
        ("llama", "group-magnitude", {"params": 1e9}, "must lie between 0 and"),
        ("llama", "group-magnitude", {"ratio": 0.97}, "cannot go"),
        ("llama", "group-magnitude", {}, "say how much"),
        ("llama", "group-magnitude", {"ratio": 0.2, "sparsity": 0.5}, "sparsity has no meaning"),
        ("llama", "wanda", {"ratio": 0.2}, "ratio is no amount"),
        ("llama", "shortgpt", {"ratio": 0.2}, "ratio has no meaning"),
        ("llama", "group-magnitude", {"ratio": 0.2, "allocation": "owl"}, "does not spread heads"),
        ("llama", "group-magnitude", {"ratio": 0.2, "width": {"units": ["head"]}}, "unknown unit 'head'"),
        ("llama", "group-magnitude", {"ratio": 0.2, "width": {"protect_first": 3}}, "all of the 3 layers"),
    ]
    for name, method, settings, message in cases:
        source = tiny.save(name, tmp_path / name)
        with pytest.raises(UserError, match=message):
            llmprune.prune(source, out=tmp_path / "out", method=method, calibration=TEXT, **settings)
        assert not list(tmp_path.glob("out*"))


def test_units_that_a_class_cannot_lose_are_zeros_on_request(tmp_path: Path) -> None:
    source = tiny.save("bloom", tmp_path / "dense")
    report = prune(source, "group-obs", out=tmp_path / "out", ratio=0.2, width={"units": ["channel"]}).report
    assert report["totals"]["params_after"] == report["totals"]["params_before"]
    assert report["totals"]["zeros"] > 0 and report["verified"].startswith("reloaded; logits equal")


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    source = tiny.save("qwen3", tmp_path / "dense")
    prune(source, "group-obs", out=tmp_path / "whole", ratio=0.3)
    again = prune(source, "group-obs", out=tmp_path / "again", ratio=0.3)
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert whole == (tmp_path / "again" / "model.safetensors").read_bytes()
    assert again.report["recipe"]["ratio"] == 0.3


def test_default_config_of_llama_is_kept_where_the_heads_divide(tmp_path: Path) -> None:
    config = LlamaConfig(**{**tiny.MODERN, **tiny.SPECIAL, "num_attention_heads": 4, "num_key_value_heads": 4})
    model = AutoModelForCausalLM.from_config(config).eval()
    result = prune(model, "group-obs", ratio=0.4)
    assert result.model is model and model.config.num_attention_heads == 2
    assert model.config.model_type == "llama"


def test_check_needs_the_configuration_alone(tmp_path: Path) -> None:
    tiny.TINY["llama"].save_pretrained(tmp_path)
    done = runner.cli("check", tmp_path, "--ratio", "0.3", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    rows = {row["name"]: row for row in found["methods"]}
    assert set(rows) >= set(METHODS)
    report = prune(tiny.build("llama"), "wanda-sp", ratio=0.3).report
    assert rows["wanda-sp"]["params_after"] == report["totals"]["params_after"]
    assert rows["wanda-sp"]["output"] == "plain (mistral)"
    assert not rows["flap"]["can"] and "attention_bias" in rows["flap"]["why"]
    assert not rows["reap"]["can"] and rows["shortgpt"]["what"] == "3 layers"
    assert "remote-code" in rows["flap"]["why"]  # a Llama itself takes biases
    fixed = tiny.save("bloom", tmp_path / "bloom")
    rows = {
        row["name"]: row for row in json.loads(runner.cli("check", fixed, "--ratio", "0.15", "--json").out)["methods"]
    }
    report = prune(fixed, "modegpt", out=tmp_path / "out", ratio=0.15, layout="remote-code").report
    assert rows["modegpt"]["output"] == "remote-code" and not rows["group-obs"]["can"]
    assert rows["modegpt"]["params_after"] == report["totals"]["params_after"] < report["totals"]["params_before"]
    unknown = tiny.save("mamba", tmp_path / "mamba")
    rows = {row["name"]: row for row in json.loads(runner.cli("check", unknown, "--json").out)["methods"]}
    assert "not known" in rows["group-obs"]["why"] and rows["wanda"]["can"]
    table = runner.cli("check", unknown).out
    # one row for all methods of one answer
    assert table.count("expert │") == 1 and "no: the" in table


@pytest.mark.parametrize("allocation", ["balanced", "pooled", "rising"])
def test_a_method_without_text_takes_every_allocation(allocation: str) -> None:
    model = tiny.build("llama")
    result = llmprune.prune(model, method="group-magnitude", ratio=0.2, allocation=allocation, width={"round_to": 4})
    assert result.report["totals"]["params_after"] < result.report["totals"]["params_before"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"damping": -0.1}, "damping -0.1"),
        ({"aim": 1.5}, "aim 1.5"),
        ({"method": "ziplm", "allocation": "evolutionary"}, "stream=dense"),
        ({"method": "llm-surgeon-structured", "damping_outputs": 0.0}, "damping_outputs"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_first(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        llmprune.prune(
            tiny.build("llama"),
            calibration=TEXT,
            **{"method": "group-obs", "ratio": 0.2, "width": {"round_to": 4}} | settings,
        )


@pytest.mark.parametrize(
    ("method", "allocation"), [("k-prune", "uniform"), ("wanda-sp", "pooled"), ("thinet", "uniform")]
)
def test_experts_lose_channels_too(method: str, allocation: str) -> None:
    """Their scores are an expert's own, and their products want sizes that divide by eight."""
    result = llmprune.prune(tiny.build("mixtral"), method=method, ratio=0.2, allocation=allocation, calibration=TEXT)
    widths = result.report["structure"]["widths"]
    assert result.report["totals"]["params_after"] < result.report["totals"]["params_before"]
    assert all(one % 8 == 0 for one in widths["expert-channel"])
