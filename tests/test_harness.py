"""lm-eval runs our models, and our local tasks ask exactly what lm-eval's own tasks ask."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runner import cli

import llmprune
from llmprune import UserError

pytest.importorskip("lm_eval")
pytest.importorskip("datasets")

import datasets
import lm_eval
from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from llmprune.eval import evaluate, harness
from llmprune.eval.significance import difference
from llmprune.kernels.linear24 import SparseLinear24
from llmprune.report import words

DEMO = Path(llmprune.__file__).parent / "demo" / "model"
OWN = Path(lm_eval.__file__).parent / "tasks"

PIQA = [
    {"goal": "How do I open a jar?", "sol1": "Twist the 'lid' hard.", "sol2": 'Say "open".', "label": 0},
    {"goal": "dresser", "sol1": "replace drawer with bobby pin ", "sol2": "finish, with  bobby pin ", "label": 1},
]
LAMBADA = [
    {"text": 'She looked at the clear stone.\n\n"Is it a sign?" he asked. She did not care about signs'},
    {"text": "He came to the dock on his own, and there stood Shane"},
]
BLIMP = [
    {"sentence_good": "Who should Derek hug after it?", "sentence_bad": "Who should Derek hug it after?", "UID": "a"},
    {"sentence_good": "The cats sleep.", "sentence_bad": "The cats sleeps.", "UID": "a"},
]
MMLU = [
    {"question": " What beats? ", "subject": "high_school_biology", "choices": ["a", "b c", "heart", "d"], "answer": 2},
    {"question": "2+2?", "subject": "high_school_biology", "choices": ["1", "2", "3", "4"], "answer": 3},
]


def local_rows(name: str, rows: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """The same rows in the form of the local files."""
    if name == "piqa":
        return "piqa_valid.jsonl", [
            {"context": f"Question: {r['goal']}\nAnswer:", "choices": [r["sol1"], r["sol2"]], "label": r["label"]}
            for r in rows
        ]
    if name == "lambada":
        cut = [row["text"].rsplit(" ", 1) for row in rows]
        return "lambada_openai_test.jsonl", [{"context": context, "target": f" {last}"} for context, last in cut]
    if name == "blimp":
        return "blimp.jsonl", [{"uid": r["UID"], "good": r["sentence_good"], "bad": r["sentence_bad"]} for r in rows]
    return "mmlu_test.jsonl", [
        {"subject": r["subject"], "context": r["question"], "choices": r["choices"], "label": r["answer"]} for r in rows
    ]


def requests(task: ConfigurableTask) -> list[tuple[Any, ...]]:
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests()
    return [(one.request_type, one.args, one.doc_id, one.idx) for one in task.instances]


@pytest.mark.parametrize(
    ("name", "own", "rows"),
    [
        ("piqa", "piqa/piqa.yaml", PIQA),
        ("lambada", "lambada/lambada_openai.yaml", LAMBADA),
        ("blimp", "blimp/wh_island.yaml", BLIMP),
        ("mmlu", "mmlu/default/mmlu_high_school_biology.yaml", MMLU),
    ],
)
def test_same_requests_and_answers_as_lm_eval(tmp_path: Path, name: str, own: str, rows: list[dict[str, Any]]) -> None:
    config = load_yaml(OWN / own)
    split = config.get("test_split") or config["validation_split"]
    config["custom_dataset"] = lambda **_: {split: datasets.Dataset.from_list(rows)}
    config.pop("fewshot_split", None)
    config.pop("training_split", None)
    theirs = ConfigurableTask(config=config)
    file, converted = local_rows(name, rows)
    (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in converted))
    ours = harness.manager([f"local_{name}"], tmp_path).load([f"local_{name}"])["tasks"][f"local_{name}"]
    assert requests(ours) == requests(theirs)
    assert len(requests(ours)) == sum(len(ours.doc_to_choice(d)) if name != "lambada" else 1 for d in ours.eval_docs)
    for our_doc, their_doc in zip(ours.eval_docs, theirs.eval_docs, strict=True):
        assert ours.doc_to_target(our_doc) == theirs.doc_to_target(their_doc)
        # the same answers count as right: first choice, then last, then a tie
        for likelihoods in ([-1.0, -2.0, -3.0, -4.0], [-4.0, -3.0, -2.0, -1.0]):
            count = 1 if name == "lambada" else len(ours.doc_to_choice(our_doc))
            answers = [(one, one == -1.0) for one in likelihoods[:count]]
            found, expected = ours.process_results(our_doc, answers), theirs.process_results(their_doc, answers)
            assert {key: found[key] for key in expected} == expected


@pytest.fixture
def piqa(tmp_path: Path) -> Path:
    file, rows = local_rows("piqa", PIQA * 3)
    (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_harness_itself_runs_our_model(piqa: Path) -> None:
    """lm-eval finds the class by its name, and it answers as lm-eval's own `hf` does on the same folder."""
    found = {}
    for name in ("llmprune", "hf"):
        found[name] = simple_evaluate(
            model=name,
            model_args=f"pretrained={DEMO},dtype=float32",
            tasks=["local_piqa"],
            task_manager=harness.manager(["local_piqa"], piqa),
            device="cpu",
            batch_size=2,
        )
    ours, theirs = (found[name]["samples"]["local_piqa"] for name in ("llmprune", "hf"))
    assert [row["resps"] for row in ours] == [row["resps"] for row in theirs] and len(ours) == 6
    assert found["llmprune"]["results"] == found["hf"]["results"]


def test_eval_of_tasks_beside_a_baseline(piqa: Path) -> None:
    options = ["--tasks", "local_piqa", "--task-data", piqa, "--limit", 4, "--baseline", DEMO, "--json"]
    ran = cli("eval", DEMO, *options, "--out", piqa / "out.json")
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    assert json.loads((piqa / "out.json").read_text()) == result
    row = result["tasks"]["local_piqa"]
    assert row["n"] == 4 and row["fewshot"] == 0 and 0 <= row["acc"] <= 1
    assert (row["chat_template"], row["seed"], row["dtype"]) == (False, 0, "float32")
    assert row["stderr"]["acc"] == pytest.approx(math.sqrt(row["acc"] * (1 - row["acc"]) / 3), abs=1e-9)
    assert result["baseline"]["tasks"] == result["tasks"]
    assert result["comparison"]["tasks"]["local_piqa"]["acc"]["p"] == 1


def test_sparse_runs_on_packed_weights(piqa: Path, tmp_path: Path) -> None:
    llmprune.prune(DEMO, out=tmp_path / "nm", method="magnitude", pattern="2:4")
    half = harness.PrunedLM(str(tmp_path / "nm"), sparse=True, dtype="bfloat16")
    assert {one.values.dtype for one in half.model.modules() if isinstance(one, SparseLinear24)} == {torch.bfloat16}
    answers = []
    for sparse in (True, False):
        model = harness.PrunedLM(str(tmp_path / "nm"), sparse=sparse, batch_size=2)
        assert any(isinstance(one, SparseLinear24) for one in model.model.modules()) is sparse
        found = simple_evaluate(model=model, tasks=["local_piqa"], task_manager=harness.manager(["local_piqa"], piqa))
        answers.append([float(one[0][0]) for row in found["samples"]["local_piqa"] for one in row["resps"]])
    # the same products added in another order: float32 rounding of logits near 10, over at most 40 tokens
    assert answers[0] == pytest.approx(answers[1], abs=40 * 10 * 2**-23 * 10)


def test_wrong_tasks_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMPRUNE_TASK_DATA", raising=False)
    for arguments, says in (
        (["--tasks", "local_pika"], "unknown task 'local_pika'; did you mean 'local_piqa'?"),
        (["--tasks", "local_piqa"], "pass --task-data FOLDER"),
        (["--tasks", "local_piqa", "--task-data", tmp_path], "there is no piqa_valid.jsonl"),
        (["--record"], "say what to measure: --perplexity"),
        (["--record", "--perplexity", "demo"], "only a model that llmprune made"),
    ):
        ran = cli("eval", DEMO, *arguments)
        assert ran.code == 2 and ran.out == "" and says in ran.err, ran.err


def test_wrong_settings_are_found_before_anything_is_loaded(piqa: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_model(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(evaluate, "open_model", no_model)
    for arguments, says in (
        (["--limit", 0], "limit 0 must be"),
        (["--limit", -3], "limit -3 must be"),
        (["--limit", 2.5], "limit 2.5 must be"),
        (["--seed", -5], "seed -5 must lie"),
        (["--fewshot", -1], "fewshot -1 must be at least 0"),
        (["--batch-size", 0], "batch_size 0 must be at least 1"),
        (["--perplexity", "file:no-such.txt"], "no-such.txt"),
        (["--perplexity", "demo", "--seqlen", 1], "seqlen 1 must be at least 2"),
    ):
        ran = cli("eval", DEMO, "--tasks", "local_piqa", "--task-data", piqa, *arguments)
        assert ran.code == 2 and ran.out == "" and says in ran.err, ran.err


def test_no_chat_template(piqa: Path) -> None:
    ran = cli("eval", DEMO, "--tasks", "local_piqa", "--task-data", piqa, "--chat-template")
    assert ran.code == 2 and "the model's tokenizer has none" in ran.err


def test_tasks_of_the_users_beside_ours(
    piqa: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (piqa / "mine").mkdir()
    (piqa / "mine" / "mine.yaml").write_text(f"include: {harness.TASKS / 'local_piqa.yaml'}\ntask: mine\n")
    options = [
        "--model",
        "llmprune",
        "--model_args",
        f"pretrained={DEMO}",
        "--tasks",
        "mine,local_piqa",
        "--limit",
        "2",
    ]
    options += ["--metadata", json.dumps({"folder": str(piqa)}), "--batch_size", "2"]
    monkeypatch.setattr("sys.argv", ["lm_eval", *options, f"--include_path={piqa / 'mine'}"])
    harness.main()
    said = capsys.readouterr().out
    assert "|mine " in said and "|local_piqa" in said


def test_says_nothing_of_git(piqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("eval", DEMO, "--tasks", "local_piqa", "--task-data", piqa, "--limit", 1).code == 0
    assert "git" not in capfd.readouterr().err


def test_limit_keeps_paradigms_balanced(tmp_path: Path) -> None:
    rows = [{"uid": uid, "good": f"{uid} {n} good", "bad": "bad"} for uid in "abc" for n in range(3)]
    (tmp_path / "blimp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = harness.manager(["local_blimp"], tmp_path).load(["local_blimp"])["tasks"]["local_blimp"]
    assert [doc["good"][:3] for doc in task.eval_docs][:6] == ["a 0", "b 0", "c 0", "a 1", "b 1", "c 1"]


@pytest.mark.shared
def test_all_local_tasks_on_the_real_sets(shared: Path, tmp_path: Path) -> None:
    for path in (shared / "data" / "tasks").iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "wikitext2.test.raw").symlink_to(shared / "data" / "corpora" / "wikitext2.test.raw")
    names = [path.stem for path in harness.TASKS.glob("local_*.yaml")]
    loaded = harness.manager(names, tmp_path).load(names)["tasks"]
    counts = {name: len(task.eval_docs) for name, task in loaded.items()}
    assert counts["local_piqa"] == 1838 and counts["local_lambada"] == 5153 and counts["local_mmlu"] == 14042
    assert counts["local_blimp"] == 67_000 and counts["local_winogrande"] == 1267
    # the raw test file has 62 articles, as lm-eval's document-level set has
    assert counts["local_wikitext"] == 62
    for name, task in loaded.items():
        task.set_config(key="num_fewshot", value=0)
        task.build_all_requests(limit=3)
        assert all(all(isinstance(text, str) for text in one.args) for one in task.instances), name


def test_mcnemar_is_exact() -> None:
    ours = [1, 1, 1, 1, 1, 0, 0, 1, 0, 1]
    theirs = [0, 0, 0, 0, 0, 1, 0, 1, 0, 0]
    found = difference(list(map(float, ours)), list(map(float, theirs)))
    # by definition: all sign patterns of the discordant rows are equally likely
    signs = [a - b for a, b in zip(ours, theirs, strict=True) if a != b]
    extreme = [abs(sum(flip)) >= abs(sum(signs)) for flip in itertools.product((-1, 1), repeat=len(signs))]
    assert found["p"] == pytest.approx(sum(extreme) / len(extreme), rel=1e-12)
    assert (found["better"], found["worse"], found["delta"]) == (6, 1, 0.5)


def test_paired_t_by_integration() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=12), rng.normal(size=12) + 0.5
    found = difference(list(ours), list(theirs))
    change = ours - theirs
    t = change.mean() / (change.std(ddof=1) / math.sqrt(12))
    scale = math.gamma(6) / (math.sqrt(11 * math.pi) * math.gamma(5.5))
    inside = np.linspace(-abs(t), abs(t), 200_001)
    density = scale * (1 + inside**2 / 11) ** -6
    assert found["p"] == pytest.approx(1 - np.trapezoid(density, inside), rel=1e-6)
    assert found["stderr"] == pytest.approx(change.std(ddof=1) / math.sqrt(12))


def test_differences_without_spread() -> None:
    assert difference([0.5, 0.5], [0.5, 0.5])["p"] == 1
    assert difference([0.5], [0.7])["p"] is None
    assert difference([1.5, 2.5], [0.5, 1.5])["p"] is None


def test_records_of_several_calls_are_joined(piqa: Path, tmp_path: Path) -> None:
    model = tmp_path / "half"
    llmprune.prune(DEMO, out=model, method="magnitude", sparsity=0.3)
    text = ["--perplexity", "demo", "--seqlen", 32, "--max-windows", 2]

    def record(*options: object) -> tuple[dict[str, Any], str]:
        ran = cli("eval", model, *options, "--record", "--json")
        assert ran.code == 0, ran.err
        return json.loads((model / "llmprune.json").read_text())["evaluation"], ran.err

    first, _ = record(*text, "--baseline", DEMO)
    both, _ = record("--tasks", "local_piqa", "--task-data", piqa, "--prompt", "Once", "--baseline", DEMO)
    for one, other in ((both, first), (both["baseline"], first["baseline"]), (both["comparison"], first["comparison"])):
        assert one["perplexity"] == other["perplexity"] and one["tasks"].keys() == {"local_piqa"}
    # the dense model's figure for a text goes with the pruned one's
    alone, _ = record("--perplexity", "demo", "--seqlen", 16, "--max-windows", 2)
    assert alone["perplexity"]["demo"]["seqlen"] == 16
    assert alone["baseline"]["perplexity"] == alone["comparison"]["perplexity"] == {}
    for part in ("tasks", "generation"):
        assert alone[part] == both[part] and alone["baseline"][part] == both["baseline"][part]
    shutil.copytree(DEMO, tmp_path / "other")
    beside, said = record(*text, "--baseline", tmp_path / "other")
    assert f"beside the baseline {DEMO} is dropped" in said
    assert beside["baseline"]["model"] == str(tmp_path / "other") and "tasks" not in beside["baseline"]
    assert beside["tasks"] == both["tasks"] and beside["comparison"]["tasks"] == {}


def test_filters_are_tested_apart() -> None:
    """gsm8k answers every row twice, once for each filter: the rows of the one are no evidence about the other."""

    def samples(strict: str, flexible: str) -> list[dict[str, Any]]:
        return [
            {"doc_id": n, "filter": name, "doc_hash": str(n), "metrics": ["exact_match"], "exact_match": float(right)}
            for name, answers in (("strict-match", strict), ("flexible-extract", flexible))
            for n, right in enumerate(answers)
        ]

    found = harness.compare({"gsm8k": samples("000000", "111011")}, {"gsm8k": samples("111111", "111111")})["gsm8k"]
    assert found.keys() == {"exact_match[strict-match]", "exact_match[flexible-extract]"}
    strict, flexible = found["exact_match[strict-match]"], found["exact_match[flexible-extract]"]
    assert (strict["n"], strict["delta"], strict["p"]) == (6, -1, pytest.approx(2 / 2**6))
    assert (flexible["n"], flexible["worse"], flexible["p"]) == (6, 1, 1)
    ours = {"exact_match,strict-match": 0.0, "exact_match_stderr,strict-match": 0.1}
    row = harness._row("gsm8k", ours, {"n-samples": {}, "n-shot": {}, "versions": {}})
    assert row["exact_match[strict-match]"] == 0 and row["stderr"] == {"exact_match[strict-match]": 0.1}


def test_perplexity_is_compared_by_its_log_likelihood() -> None:
    rows = [
        [
            {"doc_id": n, "filter": "none", "doc_hash": "", "metrics": ["perplexity"], "perplexity": value + n}
            for n in (0, 1)
        ]
        for value in (-3.0, -2.5)
    ]
    test = harness.compare({"x": rows[0]}, {"x": rows[1]})["x"]["perplexity"]
    assert test["of"] == "log likelihood" and test["delta"] == -0.5
    assert words.difference(test) == "-0.5 ± 0 (log likelihood)"


def test_other_rows_are_refused() -> None:
    row = {"doc_id": 0, "filter": "none", "doc_hash": "a", "metrics": ["acc"], "acc": 1.0}
    with pytest.raises(UserError, match="different rows"):
        harness.compare({"x": [row]}, {"x": [{**row, "doc_hash": "b"}]})
