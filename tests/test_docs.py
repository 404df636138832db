"""Every command and every Python block of the README and the docs runs, in the order in which it stands there."""

from __future__ import annotations

import copy
import json
import re
import runpy
import shlex
import shutil
import sys
from importlib import import_module
from pathlib import Path

import processes
import pytest
import tiny
from runner import cli
from transformers import AutoModelForCausalLM

import llmprune

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(llmprune.__file__).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "pages").glob("*.md"))]
EXAMPLES = sorted((ROOT / "scripts" / "examples").glob("*.py"))
# What other tests, or nobody but a person, can run: environments and downloads.
NOT_HERE = ("./scripts/", "pip ")
BLOCK = re.compile(r"^```(console|python|yaml)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the names that the docs use exist."""
    for name in ("path/to/model", "MODEL"):
        shutil.copytree(PACKAGE / "demo" / "model", tmp_path / name)
        # the commands ask for long windows; a model that takes short ones keeps this quick
        config = tmp_path / name / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 64}))
    # random weights, with the tokenizer of the model above
    experts = copy.deepcopy(tiny.TINY["mixtral"])
    experts.vocab_size = 512
    AutoModelForCausalLM.from_config(experts).save_pretrained(tmp_path / "MOE_MODEL")
    for path in (PACKAGE / "demo" / "model").glob("tokenizer*"):
        shutil.copy(path, tmp_path / "MOE_MODEL")
    for name, source in (("text", "calibration"), ("other-text", "eval")):
        text = (PACKAGE / "demo" / f"{source}.txt").read_text()
        (tmp_path / f"{name}.txt").write_text(text[:20_000])
    talk = {"question": "Who went to the park?", "answer": "Lily and her mother went to the park."}
    (tmp_path / "talks.jsonl").write_text((json.dumps(talk) + "\n") * 60)
    (tmp_path / "tasks").mkdir()
    piqa = {"context": "Question: Why?\nAnswer:", "choices": ["Because.", "Not at all."], "label": 0}
    blimp = {"uid": "a", "good": "The cats sleep.", "bad": "The cats sleeps."}
    for name, row in (("piqa_valid", piqa), ("blimp", blimp)):
        (tmp_path / "tasks" / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 4)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(page: Path) -> list[tuple[str, str]]:
    return [(match[1], match[2]) for match in BLOCK.finditer(page.read_text())]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_page(page: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("lm_eval", "altair", "vl_convert", "accelerate", "peft"):
        pytest.importorskip(package)
    if page.stem in ("evaluate", "report"):
        # these pages go on from where README.md ends
        ran = cli("prune", "path/to/model", "--method", "magnitude", "--pattern", "2:4", "--out", "pruned", "--quiet")
        assert ran.code == 0, ran.err
    for kind, text in blocks(page):
        if kind == "yaml":
            (work / "recipe.yaml").write_text(text)
        elif kind == "python":
            (work / "block.py").write_text(text)
            runpy.run_path(str(work / "block.py"))
        else:
            for command in re.sub(r"\\\n\s*", " ", text).splitlines():
                run(command, work, monkeypatch)


def run(line: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not line.startswith("$ "):
        return
    command = line[2:].partition("   #")[0].strip()
    if command.startswith(NOT_HERE):
        return
    words = shlex.split(command)
    if words[:3] == ["python", "-m", "llmprune.eval.harness"]:
        from llmprune.eval import harness

        monkeypatch.setattr(sys, "argv", words[2:])
        harness.main()
        return
    if words[:2] == ["torchrun", "--nproc-per-node"] and words[3:5] == ["-m", "llmprune"]:
        runs = processes.together(int(words[2]), *words[5:], log=work / "log")
        assert not any(one.code for one in runs), f"{command}: {[one.err for one in runs]}"
        return
    assert words[0] == "llmprune", f"nobody tests {command!r}"
    if "--out" in words and words[1] in ("prune", "recover"):
        shutil.rmtree(work / words[words.index("--out") + 1], ignore_errors=True)
    ran = cli(*words[1:])
    assert ran.code == 0, f"{command}: {ran.err}"


def test_examples(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("lm_eval", "altair", "vl_convert"):
        pytest.importorskip(package)
    arguments = {
        "prune": [
            "path/to/model",
            "pruned",
            "--text",
            "file:text.txt",
            "--held-out",
            "file:other-text.txt",
            "--seqlen",
            "64",
        ],
        "push": ["pruned", "you/model-2of4", "--base-model", "org/model"],
        "harness": ["pruned", "tasks", "--limit", "4"],
    }
    assert set(arguments) == {path.stem for path in EXAMPLES}
    for name, given in arguments.items():
        monkeypatch.setattr(sys, "argv", [name, *given])
        runpy.run_path(str(ROOT / "scripts" / "examples" / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "perplexity ×" in said and "base_model: org/model" in said and "acc,none" in said
    assert (work / "pruned" / "report.html").stat().st_size > 100_000


def test_the_reference_names_what_there_is() -> None:
    """What `mkdocs build --strict` would find, without mkdocs: every object of the API page exists and has a docstring."""
    page = (ROOT / "docs" / "pages" / "api.md").read_text()
    documented = set()
    for path in re.findall(r"^::: (\S+)$", page, re.MULTILINE):
        module, _, name = path.rpartition(".")
        # the folder eval/ lies beside the package in a checkout
        found = getattr(import_module(f"llmprune.{module}" if module.startswith("eval.") else module), name)
        assert found.__doc__, path
        documented.add(name)
    assert set(llmprune.__all__) <= documented


def test_pages_are_in_the_navigation() -> None:
    navigation = (ROOT / "docs" / "mkdocs.yml").read_text()
    for page in PAGES[1:]:
        assert page.name in navigation
