"""Pushing: the real huggingface_hub client against a server on this machine; what the card keeps and says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import TOKEN, Hub
from huggingface_hub import ModelCard, constants
from runner import cli, tree

import llmprune
from llmprune import RunError, UserError
from llmprune.hub import BEGIN, END, model_card, push

DEMO = Path(llmprune.__file__).parent / "demo" / "model"
EVALUATION = {
    "perplexity": {
        "file:/home/someone/secret/text.txt": {
            "ppl": 12.345, "tokens": 1000, "windows": 2, "seqlen": 512, "stride": 512, "dtype": "float32"},
    },
    "tasks": {"piqa": {"acc": 0.6, "acc_norm": 0.62, "stderr": {"acc": 0.01, "acc_norm": None}, "n": 100, "fewshot": 0}},
    "baseline": {
        "perplexity": {"file:/home/someone/secret/text.txt": {"ppl": 11.5}},
        "tasks": {"piqa": {"acc": 0.65, "acc_norm": 0.66}},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "pruned"
    llmprune.prune(DEMO, method="magnitude", pattern="2:4", out=folder)
    report = json.loads((folder / "llmprune.json").read_text())
    (folder / "llmprune.json").write_text(json.dumps({**report, "evaluation": EVALUATION}))
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "pruned"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    for name, value in (
        ("ENDPOINT", server.url),
        ("HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"),
        ("HF_HUB_OFFLINE", False),
        ("HF_HUB_DISABLE_XET", True),
        ("HF_HUB_CACHE", str(tmp_path / "cache")),
        ("HF_TOKEN_PATH", str(tmp_path / "no-token")),
    ):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
    huggingface_hub.close_session()
    yield server
    server.close()
    huggingface_hub.close_session()


def test_everything_arrives(run: Path, hub: Hub) -> None:
    (run / "figures").mkdir()
    (run / "figures" / "one.svg").write_text("<svg/>")
    (run / "lock").write_text("")
    done = push(run, "me/small")
    there = hub.files("me/small")
    assert hub.repos["me/small"]["private"] is True
    card = done["card"].encode()
    (run / "lock").unlink()
    here = {path.relative_to(run).as_posix(): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert there == {"README.md": card, **here}
    assert sorted(there) == sorted(file["name"] for file in done["files"]) and "README.md" in there
    assert all(file["bytes"] == len(there[file["name"]]) for file in done["files"])
    assert done["url"] == f"{hub.url}/me/small"


def test_again_sends_the_weights_no_second_time(run: Path, hub: Hub) -> None:
    push(run, "me/small")
    push(run, "me/small")
    assert len([one for one in hub.asked("/blob/") if one[0] == "PUT"]) == 1


def test_public_branch_and_pull_request(run: Path, hub: Hub) -> None:
    push(run, "me/small", private=False, revision="half")
    assert hub.repos["me/small"]["private"] is False
    assert "model.safetensors" in hub.files("me/small", "half") and not hub.files("me/small")
    done = push(run, "me/small", create_pr=True)
    assert done["pull_request_url"] == f"{hub.url}/me/small/discussions/1"
    assert "model.safetensors" in hub.files("me/small", "refs/pr/1")
    with pytest.raises(UserError, match="a pull request goes to the main branch"):
        push(run, "me/small", create_pr=True, revision="half")


def test_dry_run_sends_and_writes_nothing(run: Path, hub: Hub) -> None:
    before = tree(run)
    ran = cli("push", run, "me/small", "--dry-run")
    assert ran.code == 0, ran.err
    assert "model.safetensors" in ran.out and "nothing was sent" in ran.out and "# small" in ran.out
    assert tree(run) == before
    assert not hub.repos and {verb for verb, _ in hub.requests} <= {"GET", "HEAD"}


def test_failures_of_the_server_are_retried(run: Path, hub: Hub) -> None:
    hub.fail = {"/preupload/": [503], "/blob/": [500, 502]}
    push(run, "me/small")
    assert "model.safetensors" in hub.files("me/small")
    assert len(hub.asked("/blob/")) == 3


def test_an_interrupted_upload_goes_on(run: Path, hub: Hub) -> None:
    hub.fail = {"/commit/": [500] * 20}
    with pytest.raises(RunError, match="the Hub failed \\(500\\)"):
        push(run, "me/small")
    assert not hub.files("me/small")
    hub.fail = {}
    push(run, "me/small")
    assert "model.safetensors" in hub.files("me/small")
    # the weights had arrived before the commit failed
    assert len([one for one in hub.asked("/blob/") if one[0] == "PUT"]) == 1


def test_wrong_token_is_not_shown(run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret_and_wrong")
    ran = cli("push", run, "me/small")
    assert ran.code == 2 and "the Hub refuses to write to me/small (401)" in ran.err
    assert "hf auth login" in ran.err and "hf_secret" not in ran.err + ran.out


def test_only_finished_runs_are_pushed(run: Path, tmp_path: Path, hub: Hub) -> None:
    def refused(folder: Path, says: str) -> None:
        with pytest.raises(UserError, match=says):
            push(folder, "me/small")

    refused(DEMO, "is no finished run")
    refused(Path(shutil.copytree(run, tmp_path / "x.partial")), "unfinished run")
    (run / "journal.jsonl").write_text("")
    refused(run, "unfinished run")
    (run / "journal.jsonl").unlink()
    weights = run / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(run, "truncated or corrupted")
    with pytest.raises(UserError, match="was not written"):
        llmprune.Result({}, None).push_to_hub("me/small")
    assert not hub.repos


def test_push_to_hub_does_what_push_does(run: Path, hub: Hub) -> None:
    llmprune.Result({}, run).push_to_hub("me/small", private=False)
    assert "model.safetensors" in hub.files("me/small")


def test_a_bad_name(run: Path, hub: Hub) -> None:
    with pytest.raises(UserError, match="no repository name"):
        push(run, "me/small/extra")


def test_card_metadata(run: Path) -> None:
    report = json.loads((run / "llmprune.json").read_text())
    card = model_card(run, report, "me/small", base_model="org/dense", license="mit")
    again = ModelCard(str(card))
    assert (again.data.base_model, again.data.license) == ("org/dense", "mit")
    assert again.data.tags == ["llmprune", "pruned", "magnitude", "2:4-sparsity"]
    values = {(one.dataset_name, one.metric_type): one.metric_value for one in again.data.eval_results}
    assert values == {("file:text.txt", "perplexity"): 12.345, ("piqa", "acc"): 0.6, ("piqa", "acc_norm"): 0.62}
    text = str(card)
    assert "| perplexity, file:text.txt | 12.345 | 11.500 | 1,000 tokens, windows of 512" in text
    assert "| acc, piqa | 0.6000 ± 0.0100 | 0.6500 | lm-eval, 0-shot, 100 rows |" in text
    assert "/home/someone" not in text


def test_license_is_inherited(run: Path, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "README.md").write_text("---\nlicense: apache-2.0\n---\nDense.\n")
    report = json.loads((run / "llmprune.json").read_text())
    report["recipe"]["model"] = str(dense)
    assert model_card(run, report, "me/small").data.license == "apache-2.0"


def test_what_people_wrote_survives(run: Path, hub: Hub) -> None:
    push(run, "me/small")
    edited = hub.files("me/small")["README.md"].decode()
    edited = edited.replace("tags:\n", "language: en\ntags:\n- mine\n").replace(
        "# small\n", "# A small model\n\nBy me.\n"
    )
    edited = edited.replace("Method: `magnitude`", "Method: changed inside our part") + "\n## Thanks\n\nTo all.\n"
    hub.files("me/small")["README.md"] = edited.encode()
    push(run, "me/small")
    text = hub.files("me/small")["README.md"].decode()
    assert "# A small model\n\nBy me.\n" in text and text.rstrip().endswith("## Thanks\n\nTo all.")
    assert "Method: `magnitude`" in text and "changed inside" not in text
    assert text.count(BEGIN) == text.count(END) == 1
    data = ModelCard(text).data
    assert data.language == "en" and "mine" in data.tags and "llmprune" in data.tags
    assert len(data.eval_results) == 3


def test_a_card_without_our_part_gets_it(run: Path) -> None:
    (run / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    text = str(model_card(run, json.loads((run / "llmprune.json").read_text()), "me/small"))
    assert text.index("# Mine") < text.index(BEGIN) < text.index(END)
