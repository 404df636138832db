"""Parts of recovery beside the kinds: texts and labels, divergences, layers fitted one by one, several processes."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from runner import Forked, product
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmprune
from llmprune import UserError
from llmprune.recovery.data import IGNORED, conversation, encode, pack, read_corpus
from llmprune.recovery.losses import divergence
from llmprune.recovery.recipe import Data

DEMO = Path(llmprune.__file__).parent / "demo" / "model"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello there."},
        {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((DEMO.parent / "calibration.txt").read_text()[:6000])
    return path


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruned") / "nm"
    llmprune.prune(DEMO, method="magnitude", pattern="2:4", out=folder)
    return folder


# Texts.


def test_only_responses_are_learned(tokenizer: Any) -> None:
    pieces = encode(TALK, tokenizer)
    said = "".join(tokenizer.decode(ids) for ids, response in pieces if response)
    asked = "".join(tokenizer.decode(ids) for ids, response in pieces if not response)
    assert "Hello there." in said and "Because." in said
    assert "Hi." in asked and "Why?" in asked and "Hello" not in asked and "Hi." not in said


def test_a_chat_template_is_used(tokenizer: Any) -> None:
    chatty = AutoTokenizer.from_pretrained(DEMO)
    chatty.chat_template = TEMPLATE
    pieces = encode(TALK, chatty)
    whole = [token for ids, _ in pieces for token in ids]
    assert chatty.decode(whole).replace(" ", "") == chatty.decode(
        chatty(chatty.apply_chat_template(TALK, tokenize=False), add_special_tokens=False).input_ids
    ).replace(" ", "")
    assert [response for _, response in pieces] == [False, True, False, True]
    forgetful = AutoTokenizer.from_pretrained(DEMO)
    forgetful.chat_template = "{{ messages | length }}{{ messages[-1].content }}"
    with pytest.raises(UserError, match="rewrites earlier turns"):
        encode(TALK, forgetful)


def test_packing() -> None:
    tokenizer = SimpleNamespace(pad_token_id=None, eos_token_id=9)
    examples = [[([1, 2], False), ([3], True)], [([4], False), ([5, 6, 7, 8], True)], [([1], False), ([2], True)]]
    found = pack(examples, 5, tokenizer)
    assert found.ids_NT.tolist() == [[1, 2, 3, 9, 9], [4, 5, 6, 7, 8], [1, 2, 9, 9, 9]]
    n = IGNORED
    assert found.labels_NT.tolist() == [[n, n, 3, n, n], [n, 5, 6, 7, 8], [n, 2, n, n, n]]
    assert found.scored() == 1 + 4 + 1
    # an example that is longer than a sequence loses its end
    assert pack([[([1], False), ([2] * 9, True)]], 5, tokenizer).ids_NT.tolist() == [[1, 2, 2, 2, 2]]


def test_rows_of_known_instruction_sets() -> None:
    rows = [{"question": "q", "answer": "a"}, {"instruction": "q", "input": "i", "output": "a"},
            {"messages": [{"role": "user", "content": "q", "name": "x"}, {"role": "assistant", "content": "a"}]}]  # fmt: skip
    found = [conversation(row) for row in rows]
    assert [one[-1] for one in found] == [{"role": "assistant", "content": "a"}] * 3
    assert found[1][0]["content"] == "q\n\ni"
    with pytest.raises(UserError, match="neither messages nor"):
        conversation({"title": "q"})


def test_the_end_of_a_text_is_held_out(tokenizer: Any, text: Path, tmp_path: Path) -> None:
    corpus = read_corpus(Data(source=f"file:{text}", held_out=0.25), tokenizer, 32)
    count = len(corpus.train) + len(corpus.held_out)
    assert len(corpus.held_out) == round(0.25 * count)
    assert tokenizer.decode(corpus.held_out.ids_NT[-1][-8:], skip_special_tokens=True)[-6:] in text.read_text()[-200:]
    rows = [{"prompt": f"Say {n}.", "response": f"It is {n}."} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    talk = read_corpus(Data(source=f"file:{tmp_path / 'rows.jsonl'}", held_out=0.1), tokenizer, 64)
    assert "18" in tokenizer.decode(talk.held_out.ids_NT[0]) and talk.form.startswith("conversations")
    with pytest.raises(UserError, match="too short"):
        read_corpus(Data(source=f"file:{text}"), tokenizer, 5000)


# Divergences.


def reference(teacher: np.ndarray, student: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The divergence in float64, over the outcomes in `kept` and all others taken together."""
    found = np.zeros(len(teacher))
    for row in range(len(teacher)):
        p, q = (np.exp(one[row].astype(np.float64) - one[row].max()) for one in (teacher, student))
        p, q = p / p.sum(), q / q.sum()
        pairs = [(p[token], q[token]) for token in kept[row]]
        if len(pairs) < len(p):
            rest = [token for token in range(len(p)) if token not in set(kept[row])]
            pairs.append((p[rest].sum(), q[rest].sum()))
        found[row] = sum(a * np.log(a / b) for a, b in pairs)
    return found


@pytest.mark.parametrize("top_k", [1, 4, 12, 16])
def test_divergence_against_float64(top_k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (2 * torch.randn(20, 16, generator=generator) for _ in range(2))
    log_teacher, log_student = (torch.log_softmax(one, -1) for one in (teacher, student))
    kept = log_teacher.topk(top_k, -1).indices
    ours = divergence(log_teacher.gather(-1, kept), log_student.gather(-1, kept), rest=top_k < 16)
    expected = reference(teacher.numpy(), student.numpy(), kept.numpy())
    # float32 throughout; log(1 - sum) loses what cancels, up to eps / rest
    assert np.abs(ours.numpy() - expected).max() <= 1e-5
    assert np.all(ours.numpy() >= -1e-6)
    whole = divergence(log_teacher, log_student, rest=False)
    assert torch.all(ours <= whole + 1e-5)  # taking outcomes together never raises it
    assert float(divergence(log_teacher, log_teacher, rest=False).abs().max()) == 0.0


def test_both_teachers_say_the_same(pruned: Path, text: Path, tmp_path: Path) -> None:
    curves = {}
    for name, top_k in (("stored", 512), ("beside", 0)):
        result = llmprune.recover(
            pruned, how="distill", data=f"file:{text}", out=tmp_path / name, seqlen=32, steps=3, batch_size=4,
            **{"distill.top_k": top_k},
        )  # fmt: skip
        entry = result.report["recovery"][-1]
        curves[name] = [one["loss"] for one in entry["curve"][1:]]
        assert entry["teacher"] == str(DEMO)
    # 512 tokens are the whole vocabulary; the two sum in another order
    assert curves["stored"] == pytest.approx(curves["beside"], rel=1e-4)


# Layers fitted one by one.


def test_blockwise_lowers_the_error_of_every_layer(pruned: Path, text: Path, tmp_path: Path) -> None:
    result = llmprune.recover(pruned, data=f"file:{text}", out=tmp_path / "out", seqlen=32, samples=16, passes=2)
    entry = result.report["recovery"][-1]
    assert all(row["after"] < row["before"] for row in entry["fits"]) and len(entry["fits"]) == 5
    before, after = (load_file(one / "model.safetensors") for one in (pruned, tmp_path / "out"))
    for row in result.report["tensors"]:
        assert torch.equal(after[row["name"]] == 0, before[row["name"]] == 0)
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(after[norm], before[norm])
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])
    spec = "demo"
    ppl = [llmprune.evaluate(one, perplexity=spec, seqlen=64, max_windows=8)["perplexity"][spec]["ppl"]
           for one in (pruned, tmp_path / "out")]  # fmt: skip
    assert ppl[1] < ppl[0]


@pytest.mark.parametrize("options", [{"passes": 0}, {"passes": 2, "parts": "halves"}], ids=["closed form", "halves"])
def test_blockwise_by_other_ways(options: dict[str, Any], pruned: Path, text: Path, tmp_path: Path) -> None:
    settings = {"data": f"file:{text}", "seqlen": 32, "samples": 16}
    result = llmprune.recover(pruned, out=tmp_path / "out", **settings, **options)
    fits = result.report["recovery"][-1]["fits"]
    assert all(row["after"] < row["before"] for row in fits) and len(fits) == 5
    before, after = (load_file(one / "model.safetensors") for one in (pruned, tmp_path / "out"))
    for row in result.report["tensors"]:
        assert torch.equal(after[row["name"]] == 0, before[row["name"]] == 0)
    changed = {name.split(".", 3)[3] for name in before if not torch.equal(before[name], after[name])}
    assert (changed <= {"self_attn.o_proj.weight", "mlp.down_proj.weight"}) == (options["passes"] == 0)
    with pytest.raises(UserError, match=r"training\.epochs=2.*passes"):
        llmprune.recover(pruned, out=tmp_path / "no", epochs=2, **settings)
    with pytest.raises(UserError, match="parts='both'"):
        llmprune.recover(pruned, out=tmp_path / "no", parts="both", **settings)


def test_the_closed_form_needs_two_halves(text: Path, tmp_path: Path) -> None:
    config = tiny.TINY["mamba"].__class__(**{**tiny.TINY["mamba"].to_dict(), "vocab_size": 512})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(tmp_path / "dense")
    llmprune.prune(tmp_path / "dense", method="magnitude", sparsity=0.5, out=tmp_path / "pruned")
    with pytest.raises(UserError, match=r"passes=0: the mlp of a MambaBlock is not found.*set passes to 1"):
        llmprune.recover(tmp_path / "pruned", data=f"file:{text}", seqlen=32, passes=0, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_masks_chosen_in_training_need_whole_matrices(pruned: Path, text: Path, tmp_path: Path) -> None:
    for how in ("gradual", "movement"):
        with pytest.raises(UserError, match=f"'{how}' needs every matrix whole.*leave it off"):
            llmprune.recover(
                DEMO, how=how, data=f"file:{text}", out=tmp_path / "out", sparsity=0.5, **{"training.shard": True}
            )
    assert not (tmp_path / "out").exists()


def test_blockwise_never_raises_an_error(text: Path, tmp_path: Path) -> None:
    # a model that is as the dense one but for a few weights: nothing can be better than to leave it so
    llmprune.prune(DEMO, method="magnitude", sparsity=0.0, out=tmp_path / "same")
    result = llmprune.recover(tmp_path / "same", data=f"file:{text}", out=tmp_path / "out", seqlen=32, samples=8)
    assert all(row["after"] == row["before"] == 0 for row in result.report["recovery"][-1]["fits"])
    assert product(tmp_path / "out")["model.safetensors"] == product(tmp_path / "same")["model.safetensors"]


def test_blockwise_needs_a_model_of_the_same_shapes(text: Path, tmp_path: Path) -> None:
    llmprune.prune(DEMO, drop_layers=1, calibration=f"file:{text}", seqlen=32, samples=4, out=tmp_path / "short")
    with pytest.raises(UserError, match="differ in name or shape"):
        llmprune.recover(tmp_path / "short", data=f"file:{text}", out=tmp_path / "out", seqlen=32)
    assert not (tmp_path / "out").exists()


def test_hidden_states_of_a_shorter_model(text: Path, tmp_path: Path) -> None:
    llmprune.prune(DEMO, drop_layers="1,", out=tmp_path / "short")
    settings = {"seqlen": 32, "steps": 2, "batch_size": 4, "distill.top_k": 0, "distill.hidden": 1.0}
    result = llmprune.recover(tmp_path / "short", how="distill", data=f"file:{text}", out=tmp_path / "out", **settings)
    found = result.report["recovery"][-1]["held_out"]
    assert found["trained"] < found["before"]


# Several processes.


@pytest.mark.parametrize(("how", "shard"), [("masked", False), ("masked", True)] + [
    (how, False) for how in ("sheared", "compresso", "loraprune", "lorashear", "splora", "apt")])  # fmt: skip
def test_two_processes_make_the_losses_of_one(how: str, shard: bool, pruned: Path, text: Path, tmp_path: Path) -> None:
    narrower = () if how == "masked" else ("--set", "ratio=0.3", "--set", "ramp=1.0")
    settings = ("--how", how, *narrower, "--data", f"file:{text}", "--seqlen", 32, "--steps", 3, "--batch-size", 4,
                "--device", "cpu", "--set", "training.evaluate_every=1", "--set", "training.micro_batch=1",
                "--set", f"training.shard={str(shard).lower()}")  # fmt: skip
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def process(name: str, rank: int, count: int) -> Forked:
        def as_torchrun_does() -> None:
            AcceleratorState._reset_state(reset_partial_state=True)
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
            os.environ.update({"MASTER_ADDR": "localhost", **{key: str(value) for key, value in place.items()}})

        command = ("recover", DEMO if narrower else pruned, *settings, "--out", tmp_path / name)
        return Forked(*command, log=tmp_path / f"log-{name}-{rank}", before=as_torchrun_does)

    for name, count in (("one", 1), ("two", 2)):
        for one in [process(name, rank, count) for rank in range(count)]:
            ran = one.wait()
            assert ran.code == 0, ran.err
    curves = []
    for name in ("one", "two"):
        entry = json.loads((tmp_path / name / "llmprune.json").read_text())["recovery"][-1]
        curves.append([(row["loss"], row["perplexity"]) for row in entry["curve"]])
    assert entry["run"]["processes"] == 2
    for single, both in zip(*curves, strict=True):
        # the same sums in another order, in float32
        assert [value for value in both if value] == pytest.approx([value for value in single if value], rel=1e-5)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert all(torch.allclose(weights[1][key], one, atol=1e-4) for key, one in weights[0].items())
