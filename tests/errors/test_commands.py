"""Texts, outputs, options and measurements that are wrong, and what the command line says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from refusals import DEMO, QUICK, edit_config, edit_weights, half_refused, is_refusal, prune_refused, refused
from runner import cli, process, tree

from llmprune.methods import describe

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
    is_refusal(cli("methods", "sparsegtp"), ("did you mean 'sparsegpt'?",))


def test_a_process_that_fails(work: Path) -> None:
    before = tree(work)
    ran = process("prune", work / "model", "--out", work / "out", "--sparsity", 0.5, "--method", "sparsegtp", "--json")
    is_refusal(ran, ("unknown method 'sparsegtp'", "did you mean 'sparsegpt'?"))
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
