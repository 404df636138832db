"""`llmprune search`: each figure is that of the run it stands for, once, and the budget's answer is the largest."""

from __future__ import annotations

import copy
import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import runner
import tiny
import torch
import yaml
from runner import Forked, Steps, cli
from transformers import AutoModelForCausalLM

import llmprune
from llmprune import UserError
from llmprune.report.front import front
from llmprune.report.searched import read_search, scan_table, sweep_table
from llmprune.searching.bisection import bisect, climb

DEMO = Path(llmprune.__file__).parent / "demo" / "model"
RUNS: dict[str, Any] = {"samples": 4, "seqlen": 32}
TEXT: dict[str, Any] = {"perplexity": "demo", "max_windows": 3}


def measured(folder: Path) -> float:
    found = llmprune.evaluate(folder, perplexity="demo", seqlen=32, max_windows=3)
    ppl: float = found["perplexity"]["demo"]["ppl"]
    return ppl


def test_a_sweep_is_prune_and_eval_by_hand(tmp_path: Path) -> None:
    found = llmprune.search(
        DEMO, out=tmp_path / "s", methods="wanda,shortgpt", amounts="0.4,2:4,2", latency=True,
        **RUNS, **TEXT, **{"search.prompt": 4, "search.new": 2},
    )  # fmt: skip
    assert [(row["method"], row["amount"]) for row in found["sweep"]] == [
        ("wanda", "0.4"), ("wanda", "2:4"), ("shortgpt", "2"),
    ]  # fmt: skip
    by_hand = {"0.4": {"sparsity": 0.4}, "2:4": {"pattern": "2:4"}, "2": {"drop_layers": 2}}
    for number, row in enumerate(found["sweep"]):
        result = llmprune.prune(
            DEMO, out=tmp_path / str(number), method=row["method"], **by_hand[row["amount"]], **RUNS
        )
        assert row["ppl"] == measured(tmp_path / str(number))
        assert row["zeros"] == result.report["totals"]["zeros"]
        assert row["calibration"] == result.report["calibration"]
        assert row["params_after"] == result.report["totals"]["params_after"]
        assert row["latency"]["dense"]["prefill"] > 0 and row["latency"]["pruned"]["decode"] > 0
    assert found["dense"]["ppl"] == measured(DEMO)
    heads, rows = sweep_table(found)
    assert heads[3:] == ["non-zero parameters", "parameters", "prefill time", "decoding time"] and len(rows) == 4


def test_a_budget_beside_a_timed_sweep(tmp_path: Path) -> None:
    """Whole runs of the budget have no times; those of the sweep keep theirs."""
    ran = cli(
        "search", DEMO, "--out", tmp_path / "s", "--methods", "magnitude", "--amounts", "0.2", "--sweep", "--latency",
        "--budget", "ppl<=1.3x", "--set", "search.levels=[0.2,0.3]", "--set", "search.prompt=4", "--set", "search.new=2",
        "--samples", 4, "--seqlen", 32, "--perplexity", "demo", "--max-windows", 3, "--quiet",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    heads, rows = sweep_table(read_search(tmp_path / "s"))
    assert heads[-2:] == ["prefill time", "decoding time"]
    timed = {row[0]: row[-1] != "–" for row in rows}
    assert timed == {"dense": True, "magnitude 0.2": True, "magnitude 0.3": False}


def test_a_sweep_and_a_budget_of_a_width_method(tmp_path: Path) -> None:
    """Its amounts are shares of the parameters; what is smallest is counted in parameters that are left."""
    width: dict[str, Any] = {"width.units": ["channel"], "width.round_to": 4}
    found = llmprune.search(
        DEMO, out=tmp_path / "s", methods="group-obs,group-magnitude", amounts="0.1,0.3", sweep=True,
        budget="ppl<=2x", levels="0.1,0.2,0.3", **RUNS, **TEXT, **width,
    )  # fmt: skip
    assert [(row["method"], row["amount"]) for row in found["sweep"]] == [
        (method, amount) for method in ("group-obs", "group-magnitude") for amount in ("0.1", "0.3")
    ]
    for number, row in enumerate(found["sweep"]):
        result = llmprune.prune(
            DEMO, out=tmp_path / str(number), method=row["method"], ratio=float(row["amount"]), **RUNS, **width
        )
        assert row["ppl"] == measured(tmp_path / str(number))
        assert row["params_after"] == result.report["totals"]["params_after"] < row["params_before"]
    best = found["budget"]["best"]
    assert best["ppl"] <= found["budget"]["limit"] == 2 * found["dense"]["ppl"]
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "s" / f"{best['method']}-{best['amount']}")
    assert sum(one.numel() for one in small.parameters()) == best["params_after"]
    with pytest.raises(UserError, match="takes none of the amounts"):
        llmprune.search(DEMO, out=tmp_path / "t", methods="group-obs", amounts="2:4,3", **RUNS, **TEXT)


@pytest.mark.parametrize("layout", ["demo", "mixtral"])
def test_a_scan_prunes_one_layer_alone(layout: str, tmp_path: Path) -> None:
    model = DEMO
    if layout != "demo":
        config = copy.deepcopy(tiny.TINY[layout])
        config.vocab_size = 512
        model = tmp_path / "model"
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(model)
        for path in DEMO.glob("tokenizer*"):
            shutil.copy(path, model)
    found = llmprune.search(
        model, out=tmp_path / "s", methods="magnitude,sparsegpt", amounts="0.5", scan=True, **RUNS, **TEXT
    )
    assert "sweep" not in found
    for number, row in list(enumerate(found["scan"]))[::3]:
        llmprune.prune(
            model, out=tmp_path / str(number), method=row["method"], sparsity=0.5, targets=[row["layer"]], **RUNS
        )
        # the same weights, so the same figure
        assert row["ppl"] == measured(tmp_path / str(number)), row["layer"]
    layers = {row["layer"] for row in found["scan"]}
    assert len(found["scan"]) == 2 * len(layers) and len(scan_table(found)[1]) == len(layers)
    # what is only needed for the way is gone
    assert {one.name for one in (tmp_path / "s").iterdir()} == {"points", "search.json"}


def test_what_lies_in_the_folder_stays(tmp_path: Path) -> None:
    own = tmp_path / "s" / "levels" / "of water.csv"
    own.parent.mkdir(parents=True)
    own.write_text("1, 2")
    llmprune.search(DEMO, out=tmp_path / "s", methods="magnitude", amounts="0.5", scan=True, **RUNS, **TEXT)
    assert [one.name for one in own.parent.iterdir()] == [own.name] and own.read_text() == "1, 2"


def test_a_scan_leaves_each_layer_out(tmp_path: Path) -> None:
    found = llmprune.search(DEMO, out=tmp_path / "s", methods="shortgpt", amounts="1", scan=True, **RUNS, **TEXT)
    for number, row in list(enumerate(found["scan"]))[::3]:
        llmprune.prune(DEMO, out=tmp_path / str(number), drop_layers=[number])
        assert row["ppl"] == measured(tmp_path / str(number))


def test_budget(tmp_path: Path) -> None:
    command = (
        "search", DEMO, "--out", tmp_path / "s", "--budget", "ppl<=1.3x", "--methods", "wanda,shortgpt",
        "--samples", 4, "--seqlen", 32, "--perplexity", "demo", "--max-windows", 3, "--json", "--quiet",
    )  # fmt: skip
    ran = cli(*command)
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found == json.loads((tmp_path / "s" / "search.json").read_text())
    limit = 1.3 * found["dense"]["ppl"]
    assert found["budget"]["limit"] == limit
    wanda, shortgpt = found["budget"]["methods"]
    amount = float(wanda["found"]["amount"])
    for sparsity in (amount, amount + 0.05):
        llmprune.prune(DEMO, out=tmp_path / f"{sparsity}", method="wanda", sparsity=round(sparsity, 2), **RUNS)
    assert measured(tmp_path / f"{amount}") <= limit < measured(tmp_path / f"{amount + 0.05}")
    # no number of layers can go: this model is too fragile
    assert shortgpt["found"] is None
    # whole runs decide, but most of the looking was done on layers put together
    kinds = [row["kind"] for row in wanda["tried"]]
    assert kinds.count("levels") <= math.ceil(math.log2(20))
    best = found["budget"]["best"]
    assert (best["method"], best["amount"]) == ("wanda", wanda["found"]["amount"])
    chosen = tmp_path / "s" / f"wanda-{best['amount']}"
    again = llmprune.prune(DEMO, recipe=tmp_path / "s" / "best.yaml", out=tmp_path / "again")
    assert runner.product(chosen) == runner.product(tmp_path / "again")
    assert again.report["recipe"] == best["recipe"]


def test_layers_put_together_are_the_dense_model_again_afterwards(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"methods": "magnitude", "budget": "ppl<=1.2x", "search.levels": ["0.2", "0.4"]}
    first = llmprune.search(DEMO, out=tmp_path / "a", scan=True, amounts="0.4", **asked, **RUNS, **TEXT)
    later = llmprune.search(DEMO, out=tmp_path / "b", scan=True, amounts="0.4", methods="magnitude", **RUNS, **TEXT)
    assert [row["ppl"] for row in first["scan"]] == [row["ppl"] for row in later["scan"]]
    # magnitude needs no text, so layers together are the whole run
    tried = first["budget"]["methods"][0]["tried"]
    by_kind = {kind: {row["amount"]: row["ppl"] for row in tried if row["kind"] == kind} for kind in ("levels", "run")}
    both = by_kind["levels"].keys() & by_kind["run"].keys()
    assert both and all(by_kind["levels"][one] == by_kind["run"][one] for one in both)


def test_killed_it_goes_on(tmp_path: Path) -> None:
    command = (
        "search", DEMO, "--methods", "wanda", "--amounts", "0.5", "--scan", "--sweep", "--samples", 2,
        "--seqlen", 32, "--perplexity", "demo", "--max-windows", 1, "--quiet", "--out",
    )  # fmt: skip

    def figures(folder: Path) -> Any:
        found = json.loads((folder / "search.json").read_text())
        return [[row["ppl"] for row in found[part]] for part in ("sweep", "scan")]

    steps = runner.count_steps(*command, tmp_path / "whole", folder=tmp_path)
    for at in range(2, steps, steps // 3):
        out = tmp_path / f"killed {at}"
        killed = Forked(*command, out, log=tmp_path / "log", before=Steps(tmp_path, at).install).wait()
        assert killed.code == -9
        done = {path: path.stat().st_mtime_ns for path in out.glob("points/*.json")}
        ran = cli(*command, out)
        assert ran.code == 0, ran.err
        assert figures(out) == figures(tmp_path / "whole")
        assert all(path.stat().st_mtime_ns == before for path, before in done.items())
    # a finished search measures nothing
    before = runner.tree(tmp_path / "whole" / "points")
    assert cli(*command, tmp_path / "whole").code == 0
    assert runner.tree(tmp_path / "whole" / "points") == before


def test_a_recipe_says_the_same(tmp_path: Path) -> None:
    sections = {
        "prune": {"model": str(DEMO), "calibration": {"samples": 2, "seqlen": 32}},
        "search": {"methods": ["wanda"], "amounts": [0.5], "perplexity": "demo", "max_windows": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(sections))
    ran = cli("search", "--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "a", "--quiet")
    assert ran.code == 0, ran.err
    assert "wanda 0.5" in ran.out
    found = json.loads((tmp_path / "a" / "search.json").read_text())
    alone = llmprune.search(
        DEMO,
        out=tmp_path / "b",
        methods=["wanda"],
        amounts=[0.5],
        perplexity="demo",
        max_windows=1,
        samples=2,
        seqlen=32,
    )
    assert [row["ppl"] for row in found["sweep"]] == [row["ppl"] for row in alone["sweep"]]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"budget": "ppl<1.05"}, "ppl<=1.05x"),
        ({"budget": "ppl<=0.9x"}, "better than the dense one"),
        ({"methods": "shortgpt", "amounts": "0.5"}, "takes none of the amounts"),
        ({"amounts": "half"}, "neither a number nor a pattern"),
        ({"methods": "flap", "amounts": "2:4"}, "takes none of the amounts"),
        ({"methods": "wandda"}, "did you mean 'wanda'"),
        ({"methods": "auto", "scan": True}, "cannot be solved one by one"),
        ({"perplexity": "file:no-such.txt"}, "no-such.txt"),
        ({"perplexity": None}, "name the text that decides: --perplexity SPEC"),
        ({"search.wrong": 1}, "unknown recipe key"),
    ],
)
def test_what_is_wrong_is_found_first(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        llmprune.search(DEMO, out=tmp_path / "s", **{**RUNS, **TEXT, **settings})
    assert not (tmp_path / "s").exists()


def test_a_setting_wins_over_the_option_of_the_same_name(tmp_path: Path) -> None:
    ran = cli("search", DEMO, "--out", tmp_path / "s", "--perplexity", "demo", "--samples", 2, "--set", "samples=none")
    assert ran.code == 2 and "calibration.samples" in ran.err, ran.err


def test_the_input_is_never_written_to(tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "model")
    with pytest.raises(UserError, match="input folder"):
        llmprune.search(tmp_path / "model", out=tmp_path / "model" / "s", **RUNS, **TEXT)


@pytest.mark.parametrize("count", range(1, 9))
def test_bisection_finds_the_last_good_level(count: int) -> None:
    for last in range(-1, count):
        tried: list[int] = []

        def within(level: int, last: int = last, tried: list[int] = tried) -> bool:
            tried.append(level)
            return level <= last

        assert bisect(count, within) == last
        assert len(tried) <= math.ceil(math.log2(count + 1))
        for start in range(-1, count):
            assert climb(count, start, lambda level, last=last: level <= last) == last


def test_climbing_where_the_figures_waver() -> None:
    for good in itertools.product([True, False], repeat=5):
        for start in range(5):
            level = climb(5, start, good.__getitem__)
            if level >= 0:
                assert good[level]
                assert level < start or level == 4 or not good[level + 1]
            else:
                assert not any(good[: start + 1])


def test_front_is_what_nothing_dominates() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        points = [(float(p), float(c)) for p, c in torch.randint(6, (8, 2), generator=generator)]
        # walk along falling cost: only a new lowest perplexity among equal or cheaper ones stays
        kept = []
        for p, c in points:
            rivals = sorted((d, q) for q, d in points if d <= c)
            best_cheaper = min((q for d, q in rivals if d < c), default=math.inf)
            best_equal = min(q for d, q in rivals if d == c)
            kept.append(p == best_equal and p < best_cheaper)
        assert front(points) == kept
