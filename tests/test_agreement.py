"""KL and top-1 agreement against a loop in double precision; protocols; generation; evaluate as a whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from letters import Letters
from runner import cli

import llmprune
from llmprune import UserError
from llmprune.eval.agreement import agreement, write
from llmprune.eval.perplexity import cut, measure, open_model

DEMO = Path(llmprune.__file__).parent / "demo" / "model"


@pytest.mark.parametrize("stride", [None, 5])
def test_kl_and_top1_by_definition(tmp_path: Path, stride: int | None) -> None:
    ours, theirs = tiny.build("llama", seed=1).double(), tiny.build("llama", seed=2).double()
    text = "".join(chr(40 + (7 * n) % 80) for n in range(30))
    (tmp_path / "text.txt").write_text(text)
    found = agreement(
        ours, theirs, Letters(bos=False), f"file:{tmp_path}/text.txt", seqlen=8, stride=stride, batch_size=2
    )
    ids = torch.tensor([ord(one) for one in text])
    step = stride or 8
    kls, same = [], []
    for start in range(0, len(ids) - 7, step):
        with torch.no_grad():
            p, q = (model(input_ids=ids[None, start : start + 8]).logits[0].softmax(-1) for model in (theirs, ours))
        # predictions of the tokens that no earlier window held
        for place in range(0 if start == 0 else max(0, 7 - step), 7):
            kls.append(float(sum(a * (a / b).log() for a, b in zip(p[place], q[place], strict=True))))
            same.append(int(p[place].argmax()) == int(q[place].argmax()))
    assert found["tokens"] == len(kls)
    assert found["kl"] == pytest.approx(sum(kls) / len(kls), rel=1e-5)  # log probabilities in float32
    assert found["top1"] == sum(same) / len(same)
    assert found["kl"] > 0.01


def test_a_model_agrees_with_itself(tmp_path: Path) -> None:
    model, words = open_model(DEMO)
    found = agreement(model, model, words, "demo", seqlen=64, max_windows=3)
    assert (found["kl"], found["top1"]) == (0.0, 1.0)


def test_other_vocabulary_is_refused() -> None:
    model, words = open_model(DEMO)
    with pytest.raises(UserError, match="vocabularies differ"):
        agreement(model, tiny.build("llama"), words, "demo", seqlen=64)


def test_bos_of_the_papers_and_longest_windows(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abcdefghijklmnopqrstuvwxyz" * 10)
    spec, model = f"file:{tmp_path}/text.txt", tiny.build("llama")
    words = Letters(bos=True)
    text = cut(model, words, spec, seqlen=8, bos="text").ids_WT
    assert text[0].tolist() == [1, *map(ord, "abcdefg")] and text[1, 0] == ord("h")
    assert (cut(model, words, spec, seqlen=8).ids_WT[:, 0] == 1).all()
    assert not (cut(model, words, spec, seqlen=8, bos="never").ids_WT == 1).any()
    assert measure(model, words, spec, seqlen="max")["seqlen"] == 64
    with pytest.raises(UserError, match="bos 'always' is not one of"):
        cut(model, words, spec, bos="always")  # type: ignore[arg-type]


def test_writing_is_greedy() -> None:
    model, words = open_model(DEMO)
    ids = words("Once upon a time").input_ids
    for _ in range(5):
        with torch.no_grad():
            ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    start = len(words("Once upon a time").input_ids)
    assert write(model, words, ["Once upon a time"], tokens=5) == [words.decode(ids[start:])]


def test_eval_beside_a_baseline_is_recorded(tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "model")
    (tmp_path / "model" / "llmprune.json").write_text(json.dumps({"recipe": {"method": "x"}}))
    arguments = ["--perplexity", "demo", "--seqlen", 64, "--max-windows", 2, "--baseline", DEMO, "--prompt", "Once"]
    ran = cli("eval", tmp_path / "model", *arguments, "--record", "--json")
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    close = result["comparison"]["perplexity"]["demo"]
    assert (close["ratio"], close["kl"], close["top1"]) == (1.0, 0.0, 1.0)
    assert result["generation"] == result["baseline"]["generation"] and result["generation"][0]["prompt"] == "Once"
    report = json.loads((tmp_path / "model" / "llmprune.json").read_text())
    assert report == {"recipe": {"method": "x"}, "evaluation": result}
    assert "protocol" in cli("eval", tmp_path / "model", *arguments).out
