"""The report page: what it says, that it needs nothing from outside, and that it works in a browser."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from runner import cli

import llmprune
from llmprune import UserError, progress
from llmprune.report import words
from llmprune.report.page import read_run, run_points, write_figures, write_page
from llmprune.report.searched import calibrated
from llmprune.report.tables import summary, table
from llmprune.types import Outcome

DEMO = Path(llmprune.__file__).parent / "demo" / "model"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two pruned models, measured beside the dense one."""
    place = tmp_path_factory.mktemp("report")
    made = []
    for name, method, amount in (("half", "magnitude", {"sparsity": 0.3}), ("nm", "magnitude", {"pattern": "2:4"})):
        llmprune.prune(DEMO, method=method, out=place / name, **amount)
        ran = cli("eval", place / name, "--perplexity", "demo", "--seqlen", 64, "--max-windows", 4, "--baseline", DEMO,
                  "--prompt", "Once", "--record")  # fmt: skip
        assert ran.code == 0, ran.err
        made.append(place / name)
    return made


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search with a sweep, a scan and a budget."""
    place = tmp_path_factory.mktemp("searched") / "search"
    llmprune.search(
        DEMO, out=place, methods="magnitude,keep-first", amounts="0.3,0.5,1", scan=True, sweep=True, budget="ppl<=1.3x",
        perplexity="demo", max_windows=1, seqlen=32, **{"search.levels": ["0.2", "0.3", "1"]},
    )  # fmt: skip
    return place


@pytest.fixture
def page(folders: list[Path], searched: Path, tmp_path: Path) -> Path:
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    ran = cli("report", *folders, searched, "--out", tmp_path / "report.html")
    assert ran.code == 0, ran.err
    return tmp_path / "report.html"


def test_says_what_was_measured(folders: list[Path], tmp_path: Path) -> None:
    runs = [read_run(folder) for folder in folders]
    write_page(tmp_path / "plain.html", runs, figures=False)
    text = (tmp_path / "plain.html").read_text()
    for run in runs:
        assert f"{run['evaluation']['perplexity']['demo']['ppl']:.3f}" in text
        assert f"{run['evaluation']['baseline']['perplexity']['demo']['ppl']:.3f}" in text
        assert run["evaluation"]["generation"][0]["text"].split()[0] in text
        assert all(row["name"] in text for row in run["tensors"])
    assert "times the dense model" in text
    assert '<script type="module">' not in text


def test_needs_nothing_from_outside(page: Path) -> None:
    text = page.read_text()
    head = text[: text.index('<script type="module">')]
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", head)
    assert "@import" not in head and "url(" not in head
    # and the browser is told to load nothing, whatever the library might try
    assert "default-src 'none'" in head
    assert page.stat().st_size < 2_000_000


def test_foreign_text_is_escaped(folders: list[Path], tmp_path: Path) -> None:
    run = read_run(folders[0])
    evil = "</script><script>alert(1)</script>"
    run["name"] = evil
    run["evaluation"]["generation"][0]["text"] = evil
    run["tensors"][0]["name"] = evil
    for figures in (False, True):
        if figures:
            pytest.importorskip("altair")
        write_page(tmp_path / "page.html", [run], figures=figures)
        assert "<script>alert" not in (tmp_path / "page.html").read_text()


def test_warnings(folders: list[Path], tmp_path: Path) -> None:
    run = read_run(folders[0])
    run["calibration"] = {"source": "file:a/text.txt", "sequences": 1, "longest": 2, "tokens": 2}
    run["evaluation"]["perplexity"] = {"file:a/text.txt": run["evaluation"]["perplexity"]["demo"]}
    run["evaluation"]["comparison"]["perplexity"] = {}
    write_page(tmp_path / "page.html", [run], figures=False)
    text = (tmp_path / "page.html").read_text()
    assert "calibration and evaluation text are the same (text.txt)" in text and "times the dense" not in text
    del run["evaluation"]
    write_page(tmp_path / "page.html", [run], figures=False)
    assert "quality was not measured" in (tmp_path / "page.html").read_text()
    ratio = read_run(folders[0])["evaluation"]["comparison"]["perplexity"]["demo"]["ratio"]
    for budget, warned in ((ratio - 0.001, True), (ratio + 0.001, False)):
        write_page(tmp_path / "page.html", [read_run(folders[0])], figures=False, budget=budget)
        assert ("times the dense" in (tmp_path / "page.html").read_text()) is warned


@pytest.mark.parametrize(
    ("training", "evaluation", "same"),
    [
        ("file:./t.txt", "file:t.txt", True),
        ("file:a/../t.jsonl:text", "file:t.jsonl", True),
        ("file:t.txt", "file:a/t.txt", False),
        ("wikitext2", "wikitext2", False),
        ("wikitext2", "hub:Salesforce/wikitext:wikitext-2-raw-v1:train", True),
        ("hub:d:c:test", "hub:d:c:test", True),
        ("hub:d:c", "hub:d:c", False),
        ("hub:d:c", "hub:d:c:train:other", True),
        ("demo", "demo", False),
        ("token ids given by the caller", "demo", False),
    ],
)
def test_texts_that_flatter(training: str, evaluation: str, same: bool) -> None:
    recipe = {"method": "wanda", "seed": 0}
    stages = [{"recipe": recipe, "calibration": {"source": training}}, {"recipe": recipe, "calibration": None}]
    measured = {"evaluation": {"perplexity": {evaluation: {}}}}
    for what, report in (
        ("calibration", {**stages[0], **measured}),
        ("calibration", {**stages[1], "stages": stages, **measured}),
        ("recovery", {**stages[1], "recovery": [{"data": {"source": training}}], **measured}),
    ):
        found = words.flattering(report)
        assert [text.split(" (")[0] for text in found] == [f"{what} and evaluation text are the same"] * same


def test_tables(folders: list[Path]) -> None:
    heads, rows = summary([read_run(folder) for folder in folders])
    assert [row[0] for row in rows] == ["dense model", "half", "nm"]
    assert (
        heads[-1] == "perplexity, demo (4 windows of 64, BOS in each)"
        and len({len(row) for row in [heads, *rows]}) == 1
    )
    assert list(csv.reader(table(heads, rows, "csv").splitlines())) == [heads, *rows]
    assert table(["a", "b"], [["1|2", "3"]], "md") == "| a | b |\n| --- | --- |\n| 1\\|2 | 3 |\n"
    assert r"50\% & a\_b \\" in table(["x", "y"], [["50%", "a_b"]], "tex")
    assert r"2\textasciicircum{}3 & \textasciitilde{}/a \\" in table(["x", "y"], [["2^3", "~/a"]], "tex")


def test_other_protocols_stand_apart(folders: list[Path]) -> None:
    runs = [read_run(folders[0]) for _ in range(4)]
    for run, changes in zip(runs, ({}, {"seqlen": 32, "stride": 32}, {"bos_at": "text"}, {"windows": 3}), strict=True):
        for measured in (run["evaluation"], run["evaluation"]["baseline"]):
            measured["perplexity"]["demo"].update(changes)
    heads, rows = summary(runs)
    assert heads[5:] == [
        f"perplexity, demo ({one})"
        for one in (
            "4 windows of 64, BOS in each", "4 windows of 32, BOS in each", "4 windows of 64, BOS before the text",
            "3 windows of 64, BOS in each",
        )
    ]  # fmt: skip
    assert all(row[5:].count("–") == 3 for row in rows) and run_points(runs) == []
    assert len(run_points(runs[:1] * 2)) == 2
    row = {"acc": 0.5, "stderr": {"acc": None}, "n": 9, "fewshot": 5, "seed": 3, "chat_template": True}
    runs[0]["evaluation"]["tasks"] = {"arc": row}
    runs[1]["evaluation"]["tasks"] = {"arc": {**row, "fewshot": 0, "chat_template": False}}
    heads, _ = summary(runs[:2])
    assert heads[7:] == ["arc, acc (5-shot, 9 rows, chat template, seed 3)", "arc, acc (0-shot, 9 rows)"]


def test_figures_for_papers(folders: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    ran = cli("report", folders[0], "--out", tmp_path / "r.html", "--figures", tmp_path / "figures")
    assert ran.code == 0, ran.err
    names = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert names == [
        "half-error-by-matrix.png", "half-error-by-matrix.svg", "half-zeros-by-layer.png", "half-zeros-by-layer.svg",
        "summary.csv", "summary.md", "summary.tex",
    ]  # fmt: skip
    assert (tmp_path / "figures" / names[0]).read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "figures" / names[1]).read_text()


def test_no_figure_is_written_over_another(folders: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    names = ("w-0.5", "w_0.5", "w 0.5", "W-0.5")
    runs = [{**read_run(folders[0]), "name": name, "evaluation": {}} for name in names]
    written = write_figures(tmp_path / "figures", runs, formats=("svg",))
    assert len(set(written)) == len(written) == 2 * len(names) + 3
    assert {path.name for path in written} >= {"w-0.5-zeros-by-layer.svg", "w_0.5-zeros-by-layer.svg"}


def test_refusals(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run of llmprune"):
        read_run(DEMO)
    assert cli("report", folders[0], "--out", tmp_path).code == 2
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        ran = cli("report", folders[0], "--out", tmp_path / "x.html", "--figures", place)
        assert ran.code == 2 and "must be a folder" in ran.err
    ran = cli("report", folders[0], folders[0], "--out", tmp_path / "x.html")
    assert ran.code == 2 and "different names" in ran.err
    assert not (tmp_path / "x.html").exists()


def test_a_search_is_told_and_drawn(searched: Path, tmp_path: Path) -> None:
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    ran = cli("report", searched, "--out", tmp_path / "page.html", "--figures", tmp_path / "figures")
    assert ran.code == 0, ran.err
    text, found = (tmp_path / "page.html").read_text(), json.loads((searched / "search.json").read_text())
    assert "Budget ppl&lt;=1.3x" in text and "Matrices" not in text
    for row in (*found["sweep"], found["dense"]):
        assert f"{row['ppl']:.3f}" in text
    for row in found["scan"]:
        assert f"{row['ppl'] / found['dense']['ppl']:.3f}" in text
    # magnitude and depth read no text
    assert "Calibrated" not in text and calibrated(found) == ""
    read = {"calibration": {"sequences": 4, "longest": 32, "source": "demo"}}
    found["scan"][0] |= read
    found["budget"]["methods"][0]["tried"][-1] |= read
    assert calibrated(found) == "Calibrated (magnitude) on 4 sequences of up to 32 tokens of demo, seed 0."
    rows = list(csv.reader((tmp_path / "figures" / "search-sweep.csv").open()))
    assert {row[0] for row in rows[1:]} >= {"dense", "magnitude 0.3", "magnitude 0.5", "keep-first 1"}
    assert {path.suffix for path in (tmp_path / "figures").iterdir()} == {".svg", ".png", ".md", ".tex", ".csv"}
    (searched.parent / "torn").mkdir()
    (searched.parent / "torn" / "search.json").write_text("{")
    refused = cli("report", searched.parent / "torn", "--out", tmp_path / "x.html")
    assert refused.code == 2 and "search.json" in refused.err


def test_stages_and_scores_are_shown(tmp_path: Path) -> None:
    pytest.importorskip("altair")
    calibration = {"source": "demo", "samples": 2, "seqlen": 32}
    stages = [
        {"method": "shortgpt", "drop_layers": 1, "calibration": calibration}, {"method": "magnitude", "sparsity": 0.3},
    ]  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps({"stages": stages}))
    llmprune.prune(DEMO, out=tmp_path / "staged", recipe=tmp_path / "recipe.yaml")
    llmprune.prune(DEMO, out=tmp_path / "short", method="shortgpt", drop_layers=2, samples=2, seqlen=32)
    runs = [read_run(tmp_path / name) for name in ("staged", "short")]
    write_page(tmp_path / "page.html", runs)
    text = (tmp_path / "page.html").read_text()
    assert "shortgpt, magnitude" in text and "1 layer, 0.3" in text and "2 layers" in text
    assert "shortgpt calibrated on 2 sequences of up to 32 tokens (64 in all) from demo, seed 0." in text
    assert "short: Scores of what could go" in text and "short: Similarity of hidden states" in text
    for run in runs:
        assert f"{run['totals']['params_after']:,}" in text


PROBE = """
<script type="module">
const found = {};
while (document.documentElement.dataset.drawn !== "yes") await new Promise((go) => setTimeout(go, 20));
found.figures = document.querySelectorAll("[data-figure] svg").length;
found.wanted = document.querySelectorAll("[data-figure]").length;
found.width = innerWidth;
found.fits = document.documentElement.scrollWidth <= innerWidth;
const table = document.querySelector("table.sortable#models");
const button = table.tHead.rows[0].cells[table.tHead.rows[0].cells.length - 1].querySelector("button");
const last = () => [...table.tBodies[0].rows].map((row) => row.cells[row.cells.length - 1].textContent.trim());
button.focus();
found.focused = document.activeElement === button;
button.click(); found.up = last();
button.click(); found.down = last();
found.sorted = button.closest("th").getAttribute("aria-sort");
const cell = document.querySelector("[data-figure$='Error by matrix'] .mark-rect path");
const box = cell.getBoundingClientRect();
const at = { bubbles: true, clientX: box.x + box.width / 2, clientY: box.y + box.height / 2 };
for (const kind of ["pointerover", "mouseover", "pointermove", "mousemove"]) cell.dispatchEvent(new PointerEvent(kind, at));
await new Promise((go) => setTimeout(go, 200));
found.tooltip = document.querySelector("#vg-tooltip-element.visible")?.textContent ?? "";
const dot = document.querySelector("[data-figure^='search: Perplexity against parameters'] .mark-symbol path");
const spot = dot.getBoundingClientRect();
const there = { bubbles: true, clientX: spot.x + spot.width / 2, clientY: spot.y + spot.height / 2 };
for (const kind of ["pointerover", "mouseover", "pointermove", "mousemove"]) dot.dispatchEvent(new PointerEvent(kind, there));
await new Promise((go) => setTimeout(go, 200));
found.point = document.querySelector("#vg-tooltip-element.visible")?.textContent ?? "";
parent.postMessage(JSON.stringify(found), "*");
</script>
"""
# Chromium's windows are not narrower than 500 pixels, its frames are.
FRAME = """
<!doctype html>
<body style="margin: 0">
<script>
addEventListener("message", (event) => {{
  const note = document.createElement("pre");
  note.id = "found"; note.textContent = event.data;
  document.body.append(note);
}});
</script>
<iframe src="{page}" style="border: 0; width: {width}px; height: 1000px"></iframe>
"""


def browse(page: Path, *options: str) -> tuple[str, list[str]]:
    """What Chromium prints for the page, and the messages of its console."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        f"--user-data-dir={page.parent / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=8000",
        *options, page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser(page: Path, width: int) -> None:
    head, end, _ = page.read_text().rpartition("</body>")
    page.write_text(head + PROBE + end)
    frame = page.with_name("frame.html")
    frame.write_text(FRAME.format(page=page.name, width=width))
    dom, console = browse(frame, "--window-size=1300,1000", "--dump-dom")
    assert console == []
    note = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert note is not None
    found: dict[str, Any] = json.loads(note[1])
    assert found["figures"] == found["wanted"] == 8
    assert found["width"] == width and found["fits"], "the page scrolls sideways"
    assert found["focused"] and found["sorted"] == "descending"
    assert found["up"] == sorted(found["up"], key=float) and found["down"] == found["up"][::-1]
    assert "layer" in found["tooltip"] and "error" in found["tooltip"]
    assert "model" in found["point"] and "perplexity" in found["point"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_screenshot_is_not_blank(page: Path) -> None:
    pixels = []
    for name, options in (("light", ()), ("dark", ("--blink-settings=preferredColorScheme=0",))):
        shot = page.parent / f"{name}.png"
        browse(page, "--window-size=1280,1600", f"--screenshot={shot}", *options)
        pixels.append(shot.read_bytes())
    # a blank page of this size compresses to a few kilobytes
    assert all(len(one) > 50_000 for one in pixels)
    assert pixels[0] != pixels[1]


def test_a_line_says_the_memory_that_the_end_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "current", lambda: (7 << 20, 900 << 20))
    reporter = progress.Reporter()
    reporter.start(4, 0)
    reporter.matrix(Outcome("a.weight", (2, 2), 2, 2, None, "output", None), 0.5)
    assert "7 MiB" in capsys.readouterr().err


def test_a_long_structural_run_says_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = ("--samples", 2, "--seqlen", 32)
    quick = cli("prune", DEMO, "--out", tmp_path / "quick", "--ratio", 0.2, *text)
    monkeypatch.setattr(progress, "SILENCE", 0.0)
    slow = cli("prune", DEMO, "--out", tmp_path / "slow", "--ratio", 0.2, *text)
    assert quick.code == slow.code == 0, slow.err
    assert "at layer" not in quick.err
    last = json.loads((DEMO / "config.json").read_text())["num_hidden_layers"] - 1
    for index in range(last + 1):
        assert f"at layer {index} of 0 to {last}, " in slow.err
