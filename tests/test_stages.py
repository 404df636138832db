"""Recipes of several stages: the same bytes as one command after the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import runner
import tiny
import torch
import yaml

import llmprune
from llmprune.types import UserError

TEXT = [row.tolist() for row in tiny.tokens(6, 20, seed=3)]
STAGES = [
    {"drop_layers": [0]},
    {"method": "reap", "drop_experts": 0.25},
    {"method": "wanda", "sparsity": 0.5, "engine": {"schedule": "module"}},
]


def write(path: Path, **keys: object) -> Path:
    path.write_text(yaml.safe_dump({"stages": STAGES, **keys}))
    return path


def test_stages_are_commands_in_a_row(tmp_path: Path) -> None:
    source = tiny.save("mixtral", tmp_path / "dense")
    recipe = write(tmp_path / "recipe.yaml")
    result = llmprune.prune(source, out=tmp_path / "out", recipe=recipe, calibration=TEXT)
    model: Path = source
    for number, stage in enumerate(STAGES):
        # a later stage sees the model that the one before has left
        llmprune.prune(model, out=tmp_path / str(number), calibration=TEXT, **stage)
        model = tmp_path / str(number)
    assert runner.product(tmp_path / "out") == runner.product(model)
    assert {one.name for one in tmp_path.iterdir()} == {"dense", "recipe.yaml", "out", "0", "1", "2"}
    report = json.loads((tmp_path / "out" / "llmprune.json").read_text())
    assert [one["recipe"]["method"] for one in report["stages"]] == ["keep-first", "reap", "wanda"]
    assert report["recipe"]["stages"] == STAGES
    assert report["totals"]["params_before"] == sum(one.numel() for one in tiny.build("mixtral").parameters())
    again = llmprune.prune(source, out=tmp_path / "out", recipe=recipe, calibration=TEXT, resume=True)
    assert again.report == report
    # a loaded model goes through the same stages where it lies
    loaded = tiny.build("mixtral")
    llmprune.prune(loaded, recipe=recipe, calibration=TEXT)
    ids = tiny.tokens(2, 10)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, result.model.eval()(input_ids=ids).logits)


def test_a_stopped_stage_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny.save("mixtral", tmp_path / "dense")
    recipe = write(tmp_path / "recipe.yaml")
    whole = llmprune.prune(source, out=tmp_path / "whole", recipe=recipe, calibration=TEXT)
    with monkeypatch.context() as patch:
        patch.setattr("llmprune.methods.weight.wanda.Wanda.solve", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llmprune.prune(source, out=tmp_path / "out", recipe=recipe, calibration=TEXT)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.stage2" / "config.json").exists()
    llmprune.prune(source, out=tmp_path / "out", recipe=recipe, calibration=TEXT, resume=True)
    assert runner.product(tmp_path / "out") == runner.product(tmp_path / "whole")
    assert whole.report["totals"]["params_after"] < whole.report["totals"]["params_before"]


def test_steps_follow_the_cubic_schedule_and_end_at_the_amount(tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "dense")
    settings = {"method": "wanda", "sparsity": 0.7, "calibration": TEXT}
    report = llmprune.prune(source, out=tmp_path / "out", steps=4, **settings).report
    amounts = [one["recipe"]["sparsity"] for one in report["stages"]]
    # s (1 - (1 - t/4)^3): 37/64, 56/64, 63/64 and all of it
    assert amounts == pytest.approx([0.7 * share / 64 for share in (37, 56, 63, 64)], abs=1e-15)
    once = llmprune.prune(source, out=tmp_path / "once", **settings).report
    assert report["totals"]["zeros"] == once["totals"]["zeros"]
    # by hand, each step on what the one before left
    model: Path = source
    for number, amount in enumerate(amounts):
        llmprune.prune(model, out=tmp_path / str(number), **{**settings, "sparsity": amount})
        model = tmp_path / str(number)
    assert runner.product(tmp_path / "out") == runner.product(model)


def test_steps_need_one_sparsity() -> None:
    model = tiny.build("llama")
    with pytest.raises(UserError, match="steps needs a sparsity"):
        llmprune.prune(model, method="wanda", pattern="2:4", steps=2, calibration=TEXT)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"sparsity": 0.5}, "belongs into one of the stages"),
        ({"stages": [{"model": "x"}]}, "neither a model"),
        ({"stages": [{"spartisy": 0.5}]}, "spartisy"),
        ({"stages": [{"method": "wanda", "sparsity": 0.5, "steps": 3}]}, "steps of its own"),
        ({"stages": [{"method": "magnitude", "sparsity": 0.5}, {"method": "wandaa", "sparsity": 0.6}]}, "wandaa"),
        ({"stages": [{"method": "magnitude", "sparsity": 0.5}, {"method": "shortgpt"}]}, "say how much"),
    ],
)
def test_wrong_stages(keys: dict[str, object], says: str, tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "dense")
    with pytest.raises(UserError, match=says):
        llmprune.prune(source, out=tmp_path / "out", recipe=write(tmp_path / "recipe.yaml", **keys), calibration=TEXT)
    assert {one.name for one in tmp_path.iterdir()} == {"dense", "recipe.yaml"}


def test_a_stage_that_exists_already_is_found_before_the_first_begins(tmp_path: Path) -> None:
    source, recipe = tiny.save("mixtral", tmp_path / "dense"), write(tmp_path / "recipe.yaml")
    tiny.save("mixtral", tmp_path / "out.stage2")
    with pytest.raises(UserError, match=r"out\.stage2 exists"):
        llmprune.prune(source, out=tmp_path / "out", recipe=recipe, calibration=TEXT)
    assert not (tmp_path / "out.stage1").exists()


def test_a_loaded_model_that_a_stage_makes_anew_goes_on_to_the_next(tmp_path: Path) -> None:
    """Turning the hidden state makes a new model: the stage after it prunes that one, on disk and in memory alike."""
    stages = [{"method": "slicegpt", "ratio": 0.25, "width": {"round_to": 4}}, {"method": "magnitude", "sparsity": 0.5}]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"stages": stages}))
    on_disk = llmprune.prune(
        tiny.save("llama", tmp_path / "dense"), out=tmp_path / "out", recipe=recipe, calibration=TEXT
    )
    in_memory = llmprune.prune(tiny.build("llama"), recipe=recipe, calibration=TEXT)
    totals = in_memory.report["totals"]
    assert totals["params_after"] < totals["params_before"] and totals["zeros"] == on_disk.report["totals"]["zeros"] > 0
    ids = tiny.tokens(2, 10)
    with torch.no_grad():
        assert torch.equal(in_memory.model.eval()(input_ids=ids).logits, on_disk.model.eval()(input_ids=ids).logits)


def test_the_report_is_that_of_all_stages(tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "dense")
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump({"stages": [{"method": "magnitude", "sparsity": 0.5}, {"drop_layers": [0]}]})
    )
    result = llmprune.prune(source, out=tmp_path / "out", recipe=tmp_path / "recipe.yaml")
    report, parts = result.report, result.report["stages"]
    matrices = [one for name, one in result.model.named_parameters() if ".layers." in name and one.dim() == 2]
    assert report["totals"]["zeros"] == sum(int((one == 0).sum()) for one in matrices) > 0
    assert report["run"]["seconds"] == sum(one["run"]["seconds"] for one in parts)


def test_killed_before_the_joined_report_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, recipe = tiny.save("mixtral", tmp_path / "dense"), write(tmp_path / "recipe.yaml")
    whole = llmprune.prune(source, out=tmp_path / "whole", recipe=recipe, calibration=TEXT)
    with monkeypatch.context() as patch:
        patch.setattr("llmprune.stages.write_json", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llmprune.prune(source, out=tmp_path / "out", recipe=recipe, calibration=TEXT)
    report = llmprune.prune(source, out=tmp_path / "out", recipe=recipe, calibration=TEXT, resume=True).report
    assert report["totals"] == whole.report["totals"] and len(report["stages"]) == 3
    assert runner.product(tmp_path / "out") == runner.product(tmp_path / "whole")
    assert not (tmp_path / "out.stage1").exists()
