"""Recovery by training: zeros stay bit for bit, merges are exact, runs resume, and every layout has its adapters."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from runner import Forked, cli, product
from safetensors.torch import load_file, save_file

import llmprune
from llmprune import UserError
from llmprune.recovery import KINDS, PRESETS, make_kind
from llmprune.recovery.kind import Kind
from llmprune.recovery.zeros import find_targets

pytest.importorskip("accelerate")
pytest.importorskip("peft")

DEMO = Path(llmprune.__file__).parent / "demo" / "model"
QUICK: dict[str, Any] = {"seqlen": 32, "steps": 3, "batch_size": 4, "training.evaluate_every": 2}
KEEPING = ["finetune", "distill", "masked", "spp", "merge-then-mask"]
ADAPTERS = ["masked", "spp", "lora"]
NARROWER = ["sheared", "compresso", "loraprune", "lorashear", "splora", "apt"]


@pytest.fixture(scope="module", autouse=True)
def short_text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The tests train on a few pages, so that looking at the held-out part is quick."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((DEMO.parent / "calibration.txt").read_text()[:6000])
    QUICK["data"] = f"file:{path}"
    yield
    del QUICK["data"]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo's model at 2:4 in bfloat16 files, and at 70 % unstructured."""
    place = tmp_path_factory.mktemp("pruned")
    half = place / "half"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(half)
    made = {"dense": DEMO, "2:4": place / "nm", "70 %": place / "loose"}
    llmprune.prune(half, method="magnitude", pattern="2:4", out=made["2:4"])
    llmprune.prune(DEMO, method="magnitude", sparsity=0.7, out=made["70 %"])
    return made


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("amount", ["2:4", "70 %"])
@pytest.mark.parametrize("how", KEEPING)
def test_zeros_stay(how: str, amount: str, pruned: dict[str, Path], tmp_path: Path) -> None:
    result = llmprune.recover(pruned[amount], how=how, out=tmp_path / "out", learning_rate=1e-2, **QUICK)
    before, after = weights(pruned[amount]), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    matrices = [row["name"] for row in result.report["tensors"]]
    for name in matrices:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name] == 0, before[name] == 0), name
        assert not torch.equal(after[name], before[name]), name
    assert result.report["verified"].startswith("reloaded; logits equal")
    entry = result.report["recovery"][-1]
    assert entry["held_out"]["trained"] < entry["held_out"]["before"]


@pytest.mark.parametrize("how", ["masked", "spp", "finetune"])
def test_exact_kinds_lose_nothing_by_merging(how: str, pruned: dict[str, Path], tmp_path: Path) -> None:
    entry = llmprune.recover(pruned["70 %"], how=how, out=tmp_path / "out", learning_rate=1e-2, **QUICK).report[
        "recovery"
    ][-1]["held_out"]
    # the merged weights are the very numbers that the forward computed
    assert entry["stored"] == entry["trained"]


def test_merge_then_mask_says_what_it_lost(pruned: dict[str, Path], tmp_path: Path) -> None:
    entry = llmprune.recover(
        pruned["70 %"], how="merge-then-mask", out=tmp_path / "out", learning_rate=1e-2, **QUICK
    ).report["recovery"][-1]["held_out"]
    assert entry["stored"] > entry["trained"]


def test_lora_is_refused_where_it_would_fill_zeros(pruned: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"zeros of 35 pruned matrices.*masked"):
        llmprune.recover(pruned["2:4"], how="lora", out=tmp_path / "out", **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_lora_merges_what_its_adapter_computes(pruned: dict[str, Path], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    llmprune.recover(DEMO, how="lora", out=tmp_path / "out", adapter=str(tmp_path / "adapter"), **QUICK)
    base = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(3, 20).unsqueeze(0)
    with torch.no_grad():
        gap = (adapted(ids).logits - merged(ids).logits).abs().max()
        change = (merged(ids).logits - AutoModelForCausalLM.from_pretrained(DEMO)(ids).logits).abs().max()
    # one rounding of each weight against one of each product, over a few layers
    assert gap < 1e-4 and change > 1e-2


@pytest.mark.parametrize("layout", list(tiny.TINY))
@pytest.mark.parametrize("how", ADAPTERS)
def test_adapters_find_the_matrices_of_every_layout(how: str, layout: str) -> None:
    model = tiny.build(layout)
    ids = tiny.tokens(2, 12)
    before = model(input_ids=ids, use_cache=False).logits.detach()
    targets = find_targets(model)
    layered = {one.name for one in targets if one.place is not None}
    kind: Kind = make_kind(how, {"rank": 2}, seed=0)
    kind.check(targets)
    module = kind.prepare(model, targets)
    trained = {name: one for name, one in module.named_parameters() if one.requires_grad}
    assert len(trained) == 2 * len(layered) and layered
    started = module(input_ids=ids, use_cache=False).logits
    assert torch.allclose(started, before, atol=1e-5)
    started.square().mean().backward()
    reached = {name: one for name, one in trained.items() if one.grad is not None}
    if how == "lora" and layout == "mamba":
        # its forward reads the weight of dt_proj itself, where PEFT's modules have no say; masked and spp have
        assert all("dt_proj" in name for name in trained.keys() - reached.keys())
    else:
        assert reached.keys() == trained.keys()
    with torch.no_grad():
        for one in reached.values():
            one.add_(0.05)
    adapted = module.eval()(input_ids=ids, use_cache=False).logits.detach()
    kind.merge(targets)
    merged = model.eval()(input_ids=ids, use_cache=False).logits.detach()
    assert torch.allclose(merged, adapted, atol=2e-4 * float(adapted.abs().max()))
    assert not torch.allclose(merged, before, atol=1e-3)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in tiny.build(layout).named_parameters()}


@pytest.mark.parametrize(("how", "amount", "options"), [("masked", "2:4", ())] + [
    (how, "dense", ("--set", "ratio=0.3", "--set", "ramp=1.0")) for how in NARROWER])  # fmt: skip
def test_a_killed_run_resumes_to_the_same_bytes(
    how: str, amount: str, options: tuple[str, ...], pruned: dict[str, Path], tmp_path: Path
) -> None:
    settings = ("--how", how, *options, "--data", QUICK["data"], "--seqlen", 32, "--steps", 6, "--batch-size", 4,
                "--set", "training.evaluate_every=2", "--device", "cpu")  # fmt: skip
    assert cli("recover", pruned[amount], *settings, "--out", tmp_path / "whole").code == 0
    command = ("recover", pruned[amount], *settings, "--out", tmp_path / "cut")

    def kill_at_step_5() -> None:
        from llmprune.recovery.loop import Trainer

        step = Trainer._step

        def counted(self: Trainer, *given: Any) -> None:
            if self.state.done == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            step(self, *given)

        Trainer._step = counted  # type: ignore[method-assign]

    assert Forked(*command, log=tmp_path / "log", before=kill_at_step_5).wait().code == -signal.SIGKILL
    assert not (tmp_path / "cut").exists()
    assert cli(*command).code == 2  # it says that an unfinished run lies there
    ran = cli(*command, "--resume")
    assert ran.code == 0 and "resuming at step 4 of 6" in ran.err, ran.err
    assert product(tmp_path / "cut") == product(tmp_path / "whole")
    curves = [json.loads((tmp_path / one / "llmprune.json").read_text())["recovery"][0] for one in ("cut", "whole")]
    assert [one["perplexity"] for one in curves[0]["curve"]] == [one["perplexity"] for one in curves[1]["curve"]]
    assert cli(*command, "--resume").code == 0  # finished: nothing to do


@pytest.mark.parametrize("options", [{"sparsity": 0.6, "every": 2}, {"pattern": "2:4", "every": 2},
                                     {"sparsity": 0.6, "every": 2, "rewind": True}])  # fmt: skip
def test_gradual_pruning_reaches_its_amount(options: dict[str, Any], tmp_path: Path) -> None:
    result = llmprune.recover(DEMO, how="gradual", out=tmp_path / "out", **{**QUICK, "steps": 6}, **options)
    found = weights(tmp_path / "out")
    for row in result.report["tensors"]:
        assert row["achieved"] == int((found[row["name"]] == 0).sum())
        if "pattern" in options:
            groups = (found[row["name"]] != 0).unflatten(1, (-1, 4)).sum(-1)
            assert int(groups.max()) == 2
        else:
            assert row["achieved"] == int(0.6 * found[row["name"]].numel() + 0.5)
    assert result.report["recovery"][-1]["best_step"] >= 4  # only then are all zeros there


def test_movement_pruning(tmp_path: Path) -> None:
    result = llmprune.recover(DEMO, how="movement", out=tmp_path / "top", sparsity=0.5, **{**QUICK, "steps": 6})
    assert all(row["achieved"] == row["shape"][0] * row["shape"][1] // 2 for row in result.report["tensors"])
    # it is the weights that move towards zero that go, not just the small ones
    dense, found = weights(DEMO), weights(tmp_path / "top")
    name = result.report["tensors"][0]["name"]
    assert dense[name][found[name] == 0].abs().max() > dense[name][found[name] != 0].abs().median()
    soft = llmprune.recover(
        DEMO, how="movement", mode="soft", score_rate=3000.0, pull=10.0, out=tmp_path / "soft", **QUICK
    )
    assert soft.report["totals"]["zeros"] > 0


def test_the_best_weights_are_kept(pruned: dict[str, Path], tmp_path: Path) -> None:
    # so large a rate that the first steps already spoil the model
    settings = {**QUICK, "learning_rate": 3.0, "training.patience": 1, "steps": 50}
    result = llmprune.recover(pruned["70 %"], how="finetune", out=tmp_path / "out", **settings)
    entry = result.report["recovery"][-1]
    assert entry["best_step"] == 0 and entry["steps"] == 2
    assert product(tmp_path / "out")["model.safetensors"] == product(pruned["70 %"])["model.safetensors"]


def test_micro_batches_and_recomputation_change_nothing(pruned: dict[str, Path], tmp_path: Path) -> None:
    curves = []
    for name, more in (("a", {}), ("b", {"training.micro_batch": 1}), ("c", {"training.gradient_checkpointing": True})):
        result = llmprune.recover(pruned["2:4"], how="masked", out=tmp_path / name, **QUICK, **more)
        curves.append([one["perplexity"] for one in result.report["recovery"][-1]["curve"]])
    # sums in another order, float32
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert curves[2] == pytest.approx(curves[0], rel=1e-5)
    low = llmprune.recover(
        pruned["2:4"], how="masked", out=tmp_path / "d", **QUICK, **{"training.precision": "bfloat16"}
    )
    # products in eight bits
    assert low.report["recovery"][-1]["held_out"]["trained"] == pytest.approx(curves[0][-1], rel=2**-5)


def test_time_can_end_a_training(pruned: dict[str, Path], tmp_path: Path) -> None:
    result = llmprune.recover(
        pruned["2:4"], how="finetune", out=tmp_path / "out", minutes=1e-9, **{**QUICK, "steps": 1000}
    )
    assert result.report["recovery"][-1]["steps"] == 0


def test_history_is_kept(pruned: dict[str, Path], tmp_path: Path) -> None:
    first = llmprune.recover(pruned["2:4"], how="spp", out=tmp_path / "one", **QUICK)
    (tmp_path / "one" / "llmprune.json").write_text(json.dumps({**first.report, "evaluation": {"perplexity": {}}}))
    second = llmprune.recover(tmp_path / "one", how="masked", out=tmp_path / "two", **QUICK).report
    assert [one["recipe"]["how"] for one in second["recovery"]] == ["spp", "masked"]
    assert second["recipe"]["pattern"] == "2:4" and "evaluation" not in second
    assert second["recovery"][1]["evaluation_before"] == {"perplexity": {}}


def test_a_model_of_others_can_be_recovered(pruned: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    for path in pruned["2:4"].iterdir():
        if path.name != "llmprune.json":
            (folder / path.name).write_bytes(path.read_bytes())
    report = llmprune.recover(folder, how="finetune", out=tmp_path / "out", **QUICK).report
    assert report["recipe"]["method"] == "unknown" and report["recovery"][0]["held_out"]
    with pytest.raises(UserError, match="dense model is not known"):
        llmprune.recover(folder, how="distill", out=tmp_path / "out2", **QUICK)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"how": "looora"}, "did you mean 'lora'"),
        ({"how": "masked", "rankk": 3}, "no option 'rankk'.*did you mean 'rank'"),
        ({"how": "masked", "rank": 0}, "rank=0 of kind 'masked' must be at least 1"),
        ({"how": "masked", "targets": "heads"}, "all-linear, attention, mlp"),
        ({"how": "masked", "data": "file:none.txt"}, "no text file"),
        ({"how": "masked", "seqlen": 100_000, "data.held_out": 1.5}, "held_out"),
        ({"how": "gradual"}, "say how much"),
        ({"how": "finetune", "distill.hidden": 1.0, "teacher": str(DEMO)}, "top_k=0"),
        ({"how": "finetune", "training.stepss": 1}, "did you mean 'steps'"),
        ({"how": "movement", "mode": "soft", "sparsity": 0.5}, "takes no amount"),
    ],
)
def test_wrong_input_is_said_before_anything_is_written(
    settings: dict[str, Any], text: str, pruned: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=text):
        llmprune.recover(pruned["2:4"], out=tmp_path / "out", **{**QUICK, **settings})
    assert list(tmp_path.iterdir()) == []


def test_presets_are_published_settings() -> None:
    from llmprune.recovery.recipe import load_recovery

    assert all(preset["how"] in KINDS for preset in PRESETS.values())
    recipe = load_recovery(None, {"how": "llm-pruner", "training.batch_size": 8})
    assert recipe.how == "lora" and recipe.options == {"rank": 8, "alpha": 16.0, "dropout": 0.05}
    assert recipe.training.learning_rate == 1e-4 and recipe.training.batch_size == 8 and recipe.data.seqlen == 256


def test_damaged_weights_are_not_written(pruned: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "nan"
    folder.mkdir()
    for path in pruned["70 %"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = weights(folder)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(llmprune.RunError, match="no finite number"):
        llmprune.recover(folder, how="finetune", out=tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()
