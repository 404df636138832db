"""slice-obs: the hidden state loses its share first, heads and channels the rest, as if one command came after the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import runner
import tiny
import torch
from transformers import AutoModelForCausalLM

import llmprune
from llmprune.types import UserError

TEXT = [row.tolist() for row in tiny.tokens(6, 20, seed=3)]


def in_layers(model: Any) -> int:
    return sum(one.numel() for one in model.model.layers.parameters())


def test_it_is_slicegpt_and_then_group_obs(tmp_path: Path) -> None:
    source = tiny.save("qwen3", tmp_path / "dense")
    width = {"round_to": 2}
    report = llmprune.prune(source, out=tmp_path / "out", ratio=0.2, width=width, calibration=TEXT).report
    assert report["recipe"]["method"] == "slice-obs"
    assert [one["recipe"]["method"] for one in report["stages"]] == ["slicegpt", "group-obs"]
    # a tenth of 32 dimensions is more than 3, and 2 go at a time
    assert report["stages"][0]["structure"]["hidden"]["after"] == 28
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert small.config.hidden_size == 28 and in_layers(small) <= 0.8 * in_layers(tiny.build("qwen3"))
    assert sum(one.numel() for one in small.parameters()) == report["totals"]["params_after"]
    # by hand, the second amount as what is left then of the number that should stay
    settings: dict[str, Any] = {"width": width, "calibration": TEXT}
    first = llmprune.prune(source, out=tmp_path / "one", method="slicegpt", ratio=0.1, **settings)
    rest = 1 - 0.8 * in_layers(tiny.build("qwen3")) / in_layers(first.model)
    second: dict[str, Any] = {"method": "group-obs", "allocation": "balanced", "ratio": rest}
    llmprune.prune(tmp_path / "one", out=tmp_path / "two", **second, **settings)
    assert runner.product(tmp_path / "out") == runner.product(tmp_path / "two")
    # in memory
    resident = llmprune.prune(tiny.build("qwen3"), ratio=0.2, **settings).model
    ids = tiny.tokens(2, 12)
    with torch.no_grad():
        assert float((resident(input_ids=ids).logits - small(input_ids=ids).logits).abs().max()) <= 1e-5


def test_a_number_of_parameters_and_any_method_for_the_rest(tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "dense")
    dense = sum(one.numel() for one in tiny.build("llama").parameters())
    settings: dict[str, Any] = {"calibration": TEXT, "width": {"round_to": 2, "hidden": 0.75}}
    report = llmprune.prune(source, out=tmp_path / "out", method="wanda-sp", params=0.75 * dense, **settings).report
    first, last = report["stages"]
    assert (first["recipe"]["method"], last["recipe"]["method"]) == ("slicegpt", "wanda-sp")
    assert first["totals"]["params_after"] <= dense - 0.75 * 0.25 * dense
    assert last["totals"]["params_after"] <= 0.75 * dense < first["totals"]["params_after"]


def test_as_a_stage_among_others(tmp_path: Path) -> None:
    stages: list[dict[str, Any]] = [{"drop_layers": [0]}, {"ratio": 0.2, "width": {"round_to": 2}}]
    source = tiny.save("qwen3", tmp_path / "dense")
    report = llmprune.prune(source, out=tmp_path / "out", stages=stages, calibration=TEXT).report
    assert [one["recipe"]["method"] for one in report["stages"]] == ["keep-first", "slicegpt", "group-obs"]
    llmprune.prune(source, out=tmp_path / "short", **stages[0])
    llmprune.prune(tmp_path / "short", out=tmp_path / "by hand", calibration=TEXT, **stages[1])
    assert runner.product(tmp_path / "out") == runner.product(tmp_path / "by hand")
    assert {one.name for one in tmp_path.iterdir()} == {"dense", "out", "short", "by hand"}
    again = llmprune.prune(source, out=tmp_path / "out", stages=stages, calibration=TEXT, resume=True)
    assert again.report == report


def test_a_stopped_run_goes_on_from_the_turned_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny.save("qwen3", tmp_path / "dense")
    settings: dict[str, Any] = {"ratio": 0.2, "width": {"round_to": 2}, "calibration": TEXT}
    llmprune.prune(source, out=tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        patch.setattr("llmprune.methods.width.obs.GroupOBS.decide", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llmprune.prune(source, out=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.hidden1" / "config.json").exists()
    with pytest.raises(UserError, match=r"out\.hidden1"):
        llmprune.prune(source, out=tmp_path / "out", **settings)
    llmprune.prune(source, out=tmp_path / "out", resume=True, **settings)
    assert runner.product(tmp_path / "out") == runner.product(tmp_path / "whole")
    assert {one.name for one in tmp_path.iterdir()} == {"dense", "out", "whole"}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gpt2", {"ratio": 0.2}),  # no plain class has the result
        ("qwen3", {"ratio": 0.2}),  # a step of 8 dimensions is a quarter
        ("qwen3", {"ratio": 0.2, "width": {"round_to": 2, "units": ["channel"]}}),
        ("qwen3", {"ratio": 0.2, "width": {"round_to": 2, "protect_first": 1}}),
    ],
)
def test_where_the_hidden_state_stays_it_is_group_obs(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    source = tiny.save(name, tmp_path / "dense")
    llmprune.prune(source, out=tmp_path / "out", calibration=TEXT, **settings)
    method: dict[str, Any] = {"method": "group-obs", "allocation": "balanced"}
    llmprune.prune(source, out=tmp_path / "plain", calibration=TEXT, **method, **settings)
    assert runner.product(tmp_path / "out") == runner.product(tmp_path / "plain")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.hidden_size == 32


def test_a_hidden_state_that_cannot_be_turned_is_refused_where_it_is_asked_for() -> None:
    with pytest.raises(UserError, match="no plain class holds a GPT2LMHeadModel"):
        llmprune.prune(tiny.build("gpt2"), ratio=0.2, width={"hidden": 0.5}, calibration=TEXT)
    with pytest.raises(UserError, match=r"width\.hidden"):
        llmprune.prune(tiny.build("qwen3"), ratio=0.2, width={"hidden": 1.5}, calibration=TEXT)


def test_check_says_what_comes_out(tmp_path: Path) -> None:
    source = tiny.save("qwen3", tmp_path / "dense")
    rows = json.loads(runner.cli("check", source, "--ratio", "0.4", "--json").out)["methods"]
    row = next(one for one in rows if one["name"] == "slice-obs")
    assert row["what"].startswith("24 of 32 dimensions of the hidden state, ") and row["output"] == "plain (qwen3)"
    settings: dict[str, Any] = {"allocation": "uniform", "ratio": 0.4, "calibration": TEXT}
    report = llmprune.prune(source, out=tmp_path / "out", **settings).report
    assert report["totals"]["params_after"] == row["params_after"]
