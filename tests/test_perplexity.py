"""Perplexity against its definition: a loop over single tokens in double precision, and the known models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from letters import Letters, NoSpecial
from runner import cli
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import llmprune
from llmprune import UserError
from llmprune.eval import perplexity
from llmprune.eval.perplexity import cut, measure, open_model

DEMO = Path(llmprune.__file__).parent / "demo" / "model"
VOCABULARY = 128


class Formula(PreTrainedModel):
    """A model whose logits are written down: they depend on every token of the context and on its length."""

    config_class = PretrainedConfig

    def __init__(self, positions: int = 512) -> None:
        super().__init__(PretrainedConfig(max_position_embeddings=positions))
        self.embedding = nn.Embedding(VOCABULARY, 1, dtype=torch.float64)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, use_cache: bool = True) -> CausalLMOutput:
        contexts = [[logits(row[: end + 1]) for end in range(len(row))] for row in input_ids.tolist()]
        return CausalLMOutput(logits=torch.tensor(np.array(contexts)))


def logits(context: list[int]) -> np.ndarray:
    state = sum((place + 1) * token for place, token in enumerate(context)) + 17 * len(context)
    return 2 * np.sin(np.arange(VOCABULARY) * 0.1 + state)


def nll(context: list[int], token: int) -> float:
    scores = logits(context)
    return float(np.log(np.exp(scores).sum()) - scores[token])


def by_definition(
    ids: list[int], seqlen: int, stride: int | None, bos: bool, max_windows: int | None
) -> tuple[float, int, int]:
    """Perplexity, scored tokens and windows: each token is scored in the first window that holds it, if
    anything stands before it there."""
    fresh = seqlen - bos
    step = fresh if stride is None else min(stride, fresh)
    starts = [start for start in range(0, len(ids), step) if start + fresh <= len(ids)][:max_windows]
    losses = []
    for place, token in enumerate(ids):
        start = next((start for start in starts if start <= place < start + fresh), None)
        if start is None:
            continue
        context = [1] * bos + ids[start:place]
        if context:
            losses.append(nll(context, token))
    return math.exp(math.fsum(losses) / len(losses)), len(losses), len(starts)


def text_of(count: int, seed: int = 0) -> str:
    return "".join(map(chr, np.random.default_rng(seed).integers(32, 127, count)))


def measured(text: str, tmp_path: Path, *, bos: bool = False, model: Any = None, **options: Any) -> dict[str, Any]:
    path = tmp_path / "text.txt"
    path.write_text(text)
    return measure(model or Formula(), Letters(bos=bos), f"file:{path}", **options)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_equals_its_definition(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    seqlen = data.draw(st.integers(2, 12))
    stride = data.draw(st.none() | st.integers(1, seqlen))
    max_windows = data.draw(st.none() | st.integers(1, 6))
    bos = data.draw(st.booleans())
    text = text_of(data.draw(st.integers(seqlen, 45)), data.draw(st.integers(0, 9)))
    found = measured(
        text,
        tmp_path_factory.getbasetemp(),
        bos=bos,
        seqlen=seqlen,
        stride=stride,
        max_windows=max_windows,
        batch_size=data.draw(st.integers(1, 5)),
    )
    ppl, tokens, windows = by_definition([ord(one) for one in text], seqlen, stride, bos, max_windows)
    assert (found["tokens"], found["windows"], found["bos"]) == (tokens, windows, bos)
    assert found["ppl"] == pytest.approx(ppl, rel=1e-6)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("stride", [None, 1, 3, 7, 8])
def test_tiny_llama_in_double_precision(tmp_path: Path, bos: bool, stride: int | None) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).double().eval()
    for parameter in model.parameters():
        parameter.data.mul_(8)
    text = text_of(43)
    ids = [ord(one) for one in text]
    fresh = 8 - bos
    step = min(stride or fresh, fresh)
    losses: list[float] = []
    for start in range(0, len(ids) - fresh + 1, step):
        window = torch.tensor([[1] * bos + ids[start : start + fresh]])
        with torch.no_grad():
            chances = model(input_ids=window).logits[0].double().log_softmax(-1)
        row = [-float(chances[place - 1, window[0, place]]) for place in range(1, window.shape[1])]
        losses += row if start == 0 else row[max(0, len(row) - step) :]
    found = measured(text, tmp_path, bos=bos, model=model, seqlen=8, stride=stride, batch_size=3)
    assert found["tokens"] == len(losses)
    assert found["ppl"] == pytest.approx(math.exp(math.fsum(losses) / len(losses)), rel=1e-6)
    assert found["dtype"] == "float64"
    # the weights must matter for this to say anything
    assert abs(math.log(found["ppl"]) - math.log(VOCABULARY)) > 0.1


def test_every_token_weighs_the_same(tmp_path: Path) -> None:
    # with overlap the first window scores more tokens than the others: a mean of means would differ
    ids = [ord(one) for one in text_of(20)]
    first = [nll(ids[:place], ids[place]) for place in range(1, 12)]
    rest = [nll(ids[start : start + 11], ids[start + 11]) for start in range(1, 9)]
    found = measured(text_of(20), tmp_path, seqlen=12, stride=1)
    assert found["tokens"] == 19
    assert found["ppl"] == pytest.approx(math.exp(math.fsum(first + rest) / 19), rel=1e-6)
    mean_of_means = math.exp((sum(first) / 11 + sum(rest)) / 9)
    assert found["ppl"] != pytest.approx(mean_of_means, rel=1e-4)


def test_with_stride_each_token_is_scored_once(tmp_path: Path) -> None:
    for stride in range(1, 8):
        for count in (8, 15, 22, 29):
            if (count - 8) % stride == 0:
                assert measured(text_of(count), tmp_path, seqlen=8, stride=stride)["tokens"] == count - 1


def test_a_rest_shorter_than_a_window_is_dropped(tmp_path: Path) -> None:
    whole = measured(text_of(24), tmp_path, seqlen=8)
    rest = measured(text_of(24) + "zzzzzzz", tmp_path, seqlen=8)
    assert rest == whole and whole["windows"] == 3
    assert measured(text_of(24) + "zzzzzzzz", tmp_path, seqlen=8)["windows"] == 4


@pytest.mark.parametrize("bos", [False, True])
def test_bos_begins_every_window_and_is_never_scored(tmp_path: Path, bos: bool) -> None:
    found = measured(text_of(21), tmp_path, bos=bos, seqlen=8)
    assert (found["windows"], found["tokens"], found["bos"]) == ((3, 21, True) if bos else (2, 14, False))


def test_no_bos_for_a_tokenizer_that_has_none(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(text_of(21))
    spec = f"file:{tmp_path}/text.txt"
    assert measure(Formula(), NoSpecial(bos=False), spec, seqlen=8) == measure(
        Formula(), Letters(bos=False), spec, seqlen=8
    )


def test_the_window_is_cut_to_what_the_model_takes(tmp_path: Path) -> None:
    found = measured(text_of(64), tmp_path, model=Formula(positions=16), seqlen=2048)
    assert (found["seqlen"], found["stride"], found["windows"]) == (16, 16, 4)
    with pytest.raises(UserError, match="stride 32 must lie between 1 and the sequence length 16"):
        measured(text_of(64), tmp_path, model=Formula(positions=16), seqlen=2048, stride=32)


def test_batches_do_not_change_the_result() -> None:
    model, tokenizer = open_model(DEMO)
    results = [measure(model, tokenizer, "demo", seqlen=64, max_windows=7, batch_size=size) for size in (1, 2, 7, 100)]
    assert {row["tokens"] for row in results} == {7 * 63}
    for row in results:
        assert row["ppl"] == pytest.approx(results[0]["ppl"], rel=1e-6)


def test_text_too_short(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has 5 tokens, 3 too few for one window of 8"):
        measured("short", tmp_path, seqlen=8)
    with pytest.raises(UserError, match=r"has 5 tokens, 2 too few for one window of 8"):
        measured("short", tmp_path, bos=True, seqlen=8)
    with pytest.raises(UserError, match="has 0 tokens"):
        measured("", tmp_path, seqlen=8)


def test_token_beyond_the_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="token 233, but the model knows only 128"):
        measured("a café or two", tmp_path, seqlen=4)


def test_not_a_number_is_no_perplexity(tmp_path: Path) -> None:
    class Broken(Formula):
        def forward(self, input_ids: torch.Tensor, use_cache: bool = True) -> CausalLMOutput:
            return CausalLMOutput(logits=torch.full((*input_ids.shape, VOCABULARY), math.nan))

    with pytest.raises(UserError, match="NaN or infinity"):
        measured(text_of(20), tmp_path, model=Broken(), seqlen=4)


# Files and the command.


def test_json_of_the_command(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a dog who liked to run and play with the cat. " * 30)
    spec = f"file:{text}"
    ran = cli(
        *("eval", DEMO, "--perplexity", spec, "--perplexity", "demo", "--seqlen", 64, "--stride", 32),
        *("--max-windows", 4, "--out", tmp_path / "result.json", "--json"),
    )
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert json.loads((tmp_path / "result.json").read_text()) == found
    assert found["model"] == str(DEMO) and list(found["perplexity"]) == [spec, "demo"]
    for row in found["perplexity"].values():
        assert {"ppl", "tokens", "seqlen", "stride", "dtype"} <= set(row)
        assert (row["seqlen"], row["stride"], row["dtype"], row["bos"]) == (64, 32, "float32", True)
        assert (row["windows"], row["tokens"]) == (4, 63 + 3 * 32)
    # the embedded model tells a repeated sentence from real text
    assert 1 < found["perplexity"][spec]["ppl"] < found["perplexity"]["demo"]["ppl"] < 30


def test_the_dtype_is_the_one_asked_for() -> None:
    rows = {
        dtype: llmprune.evaluate(DEMO, perplexity="demo", seqlen=64, max_windows=4, dtype=dtype)["perplexity"]["demo"]
        for dtype in ("auto", "float32", "bfloat16")
    }
    assert {name: row["dtype"] for name, row in rows.items()} == {
        "auto": "float32",
        "float32": "float32",
        "bfloat16": "bfloat16",
    }
    assert rows["auto"]["ppl"] == rows["float32"]["ppl"] != rows["bfloat16"]["ppl"]
    assert rows["bfloat16"]["ppl"] == pytest.approx(rows["float32"]["ppl"], rel=0.05)


def test_a_loaded_model() -> None:
    model, tokenizer = open_model(DEMO)
    by_path = llmprune.evaluate(DEMO, perplexity="demo", seqlen=64, max_windows=2)
    by_model = llmprune.evaluate(model, tokenizer=tokenizer, perplexity=["demo"], seqlen=64, max_windows=2)
    assert by_model["perplexity"] == by_path["perplexity"]
    with pytest.raises(UserError, match="needs tokenizer="):
        llmprune.evaluate(model, perplexity="demo")


# What the real models are known to have.


@pytest.mark.parametrize(
    ("name", "text", "max_windows", "known"),
    [
        ("stories260K", "stories", 120, "4.757"),
        ("babyllama-tok105", "stories", 120, "2.412"),
        ("tales-llama", "tales", None, "13.508"),
        ("mix-qwen3", "web", 120, "69.874"),
        ("tales-qwen3moe", "tales", None, "14.586"),
    ],
)
def test_known_perplexities(shared: Path, name: str, text: str, max_windows: int | None, known: str) -> None:
    model, tokenizer = open_model(shared / "models" / name)
    # the figures are without BOS, which two of the tokenizers add by themselves
    tokenizer.bos_token = None
    spec = f"file:{shared}/data/{text}-eval.txt"
    found = measure(model, tokenizer, spec, seqlen=256, max_windows=max_windows)
    assert f"{found['ppl']:.3f}" == known
    assert found["tokens"] == found["windows"] * 255 and not found["bos"]


@pytest.mark.parametrize("name", ["stories260K", "babyllama-tok105"])
def test_tokenizers_that_add_bos(shared: Path, name: str) -> None:
    model, tokenizer = open_model(shared / "models" / name)
    found = measure(model, tokenizer, f"file:{shared}/data/stories-eval.txt", seqlen=256, max_windows=4)
    assert found["bos"] and found["tokens"] == 4 * 255


def test_auto_batch_fits_half_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = open_model(DEMO)
    windows = cut(model, tokenizer, "demo", seqlen=32, max_windows=4)
    one = 3 * 4 * 32 * model.config.vocab_size  # float32 logits of a window, three times
    for free, expected in ((10 * one, 5), (one, 1), (0, 1), (10**15, 64)):
        monkeypatch.setattr(perplexity, "unused", lambda device, free=free: free)
        assert perplexity.fitting([model], windows, "auto") == expected
        assert perplexity.fitting([model, model], windows, "auto") == max(1, min(64, free // 2 // (2 * one)))
    monkeypatch.undo()
    asked = {"perplexity": "demo", "seqlen": 32, "max_windows": 4, "baseline": DEMO}
    auto, two = (llmprune.evaluate(DEMO, batch_size=size, **asked) for size in ("auto", 2))
    assert auto["perplexity"]["demo"]["ppl"] == pytest.approx(two["perplexity"]["demo"]["ppl"], rel=1e-5)
    with pytest.raises(UserError, match="batch_size 0"):
        llmprune.evaluate(DEMO, batch_size=0, perplexity="demo")
    assert cli("eval", DEMO, "--perplexity", "demo", "--batch-size", "many").code == 2
