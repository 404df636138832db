"""Amounts, methods, recipes and choices of matrices that are wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from refusals import QUICK, half_refused, prune_refused
from runner import cli

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
    half_refused(work, "--method", typed, says=(f"unknown method {typed!r}", f"did you mean {meant!r}?", "known:"))


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
