"""The dispatcher: the rule, what overrides it, and what is recorded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch

import llmprune
from llmprune.kernels import dispatch, eligibility, tuned
from llmprune.types import RunError, UserError

CPU = torch.device("cpu")


def too_small(x: torch.Tensor) -> str | None:
    return "too small" if x.numel() < 4 else None


def not_whole(x: torch.Tensor) -> str | None:
    return "not even" if x.numel() % 2 else None


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An operation of three implementations, called by names that differ."""
    rows = (
        dispatch.Implementation("never", "gram:gram_update_", lambda device: "no such machine"),
        dispatch.Implementation("fast", "gram:gram_update_", fits=not_whole, pays=too_small),
        dispatch.Implementation("torch", "gram:gram_update_"),
    )
    monkeypatch.setattr(dispatch, "TABLE", {"sample": rows, "other": rows[2:]})
    dispatch._asked.cache_clear()
    monkeypatch.delenv("LLMPRUNE_KERNELS", raising=False)
    yield
    dispatch._asked.cache_clear()


@pytest.mark.parametrize(
    ("count", "setting", "expected"),
    [
        (8, "", "fast"),
        (2, "", "torch"),  # it does not pay
        (5, "", "torch"),  # it does not fit
        (8, "torch", "torch"),
        (2, "sample=fast", "fast"),  # what does not pay may be asked for
        (2, "fast, other=torch", "fast"),
    ],
)
def test_rule(table: None, monkeypatch: pytest.MonkeyPatch, count: int, setting: str, expected: str) -> None:
    monkeypatch.setenv("LLMPRUNE_KERNELS", setting)
    assert dispatch.choose("sample", torch.zeros(count)).name == expected


def test_explicit_choice_that_cannot_run_raises(table: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMPRUNE_KERNELS", "sample=fast")
    dispatch.check_choice(CPU)
    with pytest.raises(RunError, match="sample=fast, which cannot run: not even"):
        dispatch.choose("sample", torch.zeros(5))
    monkeypatch.setenv("LLMPRUNE_KERNELS", "never")
    with pytest.raises(UserError, match="sample=never, which cannot run here: no such machine"):
        dispatch.check_choice(CPU)


@pytest.mark.parametrize("setting", ["cublas", "sample=cublas", "nothing=torch", "torch,other=fast"])
def test_unknown_names_are_refused(table: None, monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    monkeypatch.setenv("LLMPRUNE_KERNELS", setting)
    with pytest.raises(UserError, match="names no implementation; there are sample: never, fast, torch"):
        dispatch.check_choice(CPU)


def test_what_ran_is_recorded_with_reasons(table: None) -> None:
    with dispatch.recorded() as outer:
        dispatch.choose("sample", torch.zeros(5))
        with dispatch.recorded() as inner:
            dispatch.choose("sample", torch.zeros(2))
    dispatch.choose("sample", torch.zeros(8))
    assert inner == {"sample": {"ran": ["torch"], "passed_over": {"never": "no such machine", "fast": "too small"}}}
    assert outer["sample"]["passed_over"] == {"never": "no such machine", "fast": "too small"}


def test_kernels_run_by_themselves_only_at_sizes_where_they_were_the_fastest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"up_to": {"tokens": 8}, "launch": {}, "faster": True}
    some = {"up_to": {"tokens": 32, "outputs": 4096}, "launch": {}, "faster": False}
    (tmp_path / "some-gpu.json").write_text(json.dumps({"matmul24": [few, some, {"up_to": {}, "launch": {}}]}))
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    monkeypatch.setattr(tuned, "name_of", lambda device: "some-gpu")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tuned._read.cache_clear()
    reasons = [
        eligibility.measured("matmul24", eligibility.product_sizes, torch.empty(tokens, 4), torch.empty(outputs, 2))
        for tokens, outputs in ((1, 9000), (8, 10), (9, 10), (9, 9000), (64, 10))
    ]
    tuned._read.cache_clear()
    assert reasons[:2] == [None, None] and all("(some-gpu) says that it is the fastest" in one for one in reasons[2:])


@pytest.mark.parametrize("path", sorted(tuned.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_every_configuration_file_holds_every_size(path: Path) -> None:
    kernels = {name: entries for name, entries in json.loads(path.read_text()).items() if isinstance(entries, list)}
    default = json.loads((tuned.FOLDER / "default.json").read_text())
    assert kernels.keys() == {name for name, entries in default.items() if isinstance(entries, list)}
    for entries in kernels.values():
        assert entries[-1]["up_to"] == {} and all(entry["launch"] for entry in entries)


def test_every_row_ends_with_torch_and_every_name_resolves_without_triton() -> None:
    for ways in dispatch.TABLE.values():
        assert ways[-1].name == "torch"
        assert ways[-1].machine is ways[-1].fits is ways[-1].pays is eligibility.always
        for one in ways:
            if one.name not in ("triton", "gluon"):
                assert callable(one.run)


def test_report_says_what_ran(tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "dense")
    llmprune.prune(
        source, out=tmp_path / "out", method="sparsegpt", sparsity=0.5, calibration=tiny.tokens().tolist(), batch_size=2
    )
    kernels = json.loads((tmp_path / "out" / "llmprune.json").read_text())["run"]["kernels"]
    assert "torch" in kernels["product"]["ran"]


def test_wrong_choice_stops_a_run_before_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny.save("llama", tmp_path / "dense")
    monkeypatch.setenv("LLMPRUNE_KERNELS", "product=cublas")
    with pytest.raises(UserError, match="product=cublas"):
        llmprune.prune(source, out=tmp_path / "out", method="magnitude", sparsity=0.5)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
