"""Pushing: the real huggingface_hub client against a server on this machine; what the card keeps and says."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hub_server import TOKEN, Hub
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError
from runner import cli, tree

import llmprune
from llmprune import RunError, UserError
from llmprune.hub import push
from llmprune.kernels.linear24 import SparseLinear24
from llmprune.report.card import BEGIN, END, model_card

DEMO = Path(llmprune.__file__).parent / "demo" / "model"
TEXT = "file:/home/someone/secret/text.txt"
WINDOWS = {
    "tokens": 1000, "windows": 2, "seqlen": 512, "stride": 512, "bos": True, "bos_at": "window", "dtype": "float32",
}  # fmt: skip
PROMPTS = {"n": 100, "fewshot": 0, "chat_template": False, "seed": 0, "dtype": "float32"}
EVALUATION = {
    "perplexity": {
        TEXT: {"ppl": 12.345, **WINDOWS},
    },
    "tasks": {"piqa": {"acc": 0.6, "acc_norm": 0.62, "stderr": {"acc": 0.01, "acc_norm": None}, **PROMPTS}},
    "baseline": {
        "model": "/home/someone/dense",
        "perplexity": {TEXT: {"ppl": 11.5, **WINDOWS}},
        "tasks": {"piqa": {"acc": 0.65, "acc_norm": 0.66, "stderr": {"acc": 0.01, "acc_norm": None}, **PROMPTS}},
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
    assert there == {"README.md": card, "report.html": there["report.html"], **here}
    assert "<h1>small: pruned by magnitude</h1>" in there["report.html"].decode()
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
    card = model_card(run, report, "me/small", base="org/dense", license="mit")
    again = ModelCard(str(card))
    assert (again.data.base_model, again.data.license) == ("org/dense", "mit")
    assert again.data.tags == ["llmprune", "pruned", "magnitude", "2:4-sparsity"]
    values = {(one.dataset_name, one.metric_type): one.metric_value for one in again.data.eval_results}
    assert values == {("file:text.txt", "perplexity"): 12.345, ("piqa", "acc"): 0.6, ("piqa", "acc_norm"): 0.62}
    text = str(card)
    assert (
        "| perplexity, file:text.txt | 12.345 | 11.500 | 1,000 tokens, 2 windows of 512, BOS in each, float32 |" in text
    )
    assert "| acc, piqa | 0.6000 ± 0.0100 | 0.6500 | lm-eval, 0-shot, 100 rows, float32 |" in text
    assert "/home/someone" not in text


def test_license_is_inherited(run: Path, tmp_path: Path, hub: Hub) -> None:
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "README.md").write_text("---\nlicense: apache-2.0\n---\nDense.\n")
    change_report(run, lambda report: report["recipe"].update(model=str(dense)))
    assert ModelCard(push(run, "me/small", dry_run=True)["card"]).data.license == "apache-2.0"


def test_no_license_comes_from_where_one_happens_to_be(
    run: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (tmp_path, tmp_path / "org" / "dense"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text("---\nlicense: gpl-3.0\n---\nAnother.\n")
    monkeypatch.chdir(tmp_path)
    for model, recorded in (("", None), ("org/dense", "org/dense")):
        report = json.loads((run / "llmprune.json").read_text())
        report |= {"recipe": {**report["recipe"], "model": model}, "hub_model": recorded}
        (run / "llmprune.json").write_text(json.dumps(report))
        assert ModelCard(push(run, "me/small", dry_run=True)["card"]).data.license is None


def test_license_of_its_own_name_is_inherited_whole(run: Path, hub: Hub) -> None:
    terms = "license: other\nlicense_name: ours\nlicense_link: LICENSE"
    hub.repos["org/dense"] = {"private": False, "branches": {"main": {"README.md": f"---\n{terms}\n---\n".encode()}}}
    card = push(run, "me/small", dry_run=True, base_model="org/dense")["card"]
    assert terms in card
    (run / "README.md").write_text(card)
    data = ModelCard(push(run, "me/small", dry_run=True, license="mit")["card"]).data
    assert (data.license, data.license_name, data.license_link) == ("mit", None, None)


@pytest.mark.parametrize(
    ("recorded", "base"), [("org/dense@v1", "org/dense"), ("org/dense", "org/dense"), (None, None)], ids=str
)
def test_the_base_model_is_the_one_on_the_hub(run: Path, hub: Hub, recorded: str | None, base: str | None) -> None:
    change_report(run, lambda report: report.update(hub_model=recorded))
    card = push(run, "me/small", dry_run=True)["card"]
    assert ModelCard(card).data.base_model == base
    assert ("huggingface.co/org/dense)" in card) is (base is not None)


def test_a_folder_is_no_base_model_wherever_it_is_pushed_from(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(DEMO, tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path)
    stages = [{"method": "magnitude", "sparsity": 0.3}, {"drop_layers": [1]}]
    Path("recipe.yaml").write_text(json.dumps({"stages": stages}))
    llmprune.prune("models/tiny", out="small", recipe="recipe.yaml")
    monkeypatch.chdir(DEMO)
    card = push(tmp_path / "small", "me/small", dry_run=True)["card"]
    assert ModelCard(card).data.base_model is None and "models/tiny" not in card
    assert not hub.asked("models/tiny")


def test_the_report_travels_along(run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as lacking:
        lacking.setitem(sys.modules, "altair", None)
        for name in ("figures", "fronts"):
            lacking.delitem(sys.modules, f"llmprune.report.{name}", raising=False)
        done = push(run, "me/small")
    assert "pip install 'llmprune[report]'" in done["notes"][0]
    assert "12.345" in hub.files("me/small")["report.html"].decode()
    (run / "report.html").write_text("mine")
    assert push(run, "me/small")["notes"] == []
    assert hub.files("me/small")["report.html"] == b"mine"


def load_as_told(card: str, folder: Path) -> dict[str, Any]:
    """The names that the card's own code leaves, with the folder for the repository."""
    told: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        before = told.get("model")
        exec(block.replace("me/small", str(folder)), told)  # noqa: S102 (this is what the card is for)
        assert told["model"] is not before
    return told


def test_a_24_model_loads_as_the_card_says(run: Path, hub: Hub) -> None:
    card = push(run, "me/small", dry_run=True)["card"]
    told = load_as_told(card, run)
    assert any(isinstance(module, SparseLinear24) for module in told["model"].modules())
    assert card.count("from_pretrained") == 2 and "trust_remote_code" not in card
    assert "Zeros are stored as zeros" in card and "parameters, and its files" not in card


def test_a_model_of_less_loads_as_the_card_says(tmp_path: Path, hub: Hub) -> None:
    parts = {"method": "llm-drop", "drop_layers": 1, "samples": 2, "seqlen": 32, "layout": "remote-code"}
    for name, settings in (("plain", {"drop_layers": [1]}), ("own", parts)):
        llmprune.prune(DEMO, out=tmp_path / name, **settings)
        card = push(tmp_path / name, "me/small", dry_run=True)["card"]
        own = name == "own"
        assert ("trust_remote_code=True" in card) is ("read them before" in card) is ("cannot load it" in card) is own
        assert "% of the dense model's parameters, and its files are smaller" in card
        assert "sparse=True" not in card and "Zeros are stored" not in card
        report = json.loads((tmp_path / name / "llmprune.json").read_text())
        assert load_as_told(card, tmp_path / name)["model"].num_parameters() == report["totals"]["params_after"]


def test_the_text_of_every_stage_is_told(tmp_path: Path, hub: Hub) -> None:
    calibration = {"source": "demo", "samples": 2, "seqlen": 32}
    stages = [{"method": "wanda", "sparsity": 0.3, "calibration": calibration}, {"drop_layers": [1]}]
    (tmp_path / "recipe.yaml").write_text(json.dumps({"stages": stages}))
    llmprune.prune(DEMO, out=tmp_path / "small", recipe=tmp_path / "recipe.yaml")
    card = push(tmp_path / "small", "me/small", dry_run=True)["card"]
    assert "* Calibration of `wanda`: 2 sequences of up to 32 tokens (64 in all) of demo, seed 0." in card
    assert "No calibration text" not in card


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
    text = push(run, "me/small", dry_run=True)["card"]
    assert text.index("# Mine") < text.index(BEGIN) < text.index(END)


def test_a_new_branch_begins_with_the_card_of_the_main_one(run: Path, hub: Hub) -> None:
    push(run, "me/small")
    edit(hub, "By me.")
    push(run, "me/small", revision="half")
    assert "By me." in hub.files("me/small", "half")["README.md"].decode()
    edit(hub, "Only here.", "half")
    push(run, "me/small", revision="half")
    text = hub.files("me/small", "half")["README.md"].decode()
    assert "Only here." in text and "Only here." not in hub.files("me/small")["README.md"].decode()


@pytest.mark.parametrize("cached", [False, True])
def test_edits_on_the_hub_outlive_its_failures(run: Path, hub: Hub, cached: bool) -> None:
    push(run, "me/small")
    if cached:
        huggingface_hub.hf_hub_download("me/small", "README.md", endpoint=hub.url)
    edit(hub, "By me.")
    hub.fail = {"/resolve/": [503]}
    push(run, "me/small")
    assert "By me." in hub.files("me/small")["README.md"].decode()
    sent = len(hub.asked("/commit/"))
    hub.fail = {"/resolve/": [503] * 20}
    with pytest.raises(RunError, match=r"the model card of me/small cannot be read .*; repeat the command"):
        push(run, "me/small")
    assert len(hub.asked("/commit/")) == sent
    ran = cli("push", run, "me/small", "--dry-run")
    assert ran.code == 0 and "the model card of me/small cannot be read" in ran.err
    hub.fail = {"org/dense/resolve/": [503] * 20}
    with pytest.raises(RunError, match=r"the model card of org/dense cannot be read .*, or give the licence"):
        push(run, "me/small", base_model="org/dense")
    push(run, "me/small", base_model="org/dense", license="mit")


@pytest.mark.parametrize("token", ["hf_secret\n", "hf_secret\nX: y", "hf_sécret", "hf secret", " "])
def test_no_message_holds_a_token(
    run: Path, hub: Hub, token: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    for ask in (lambda: push(run, "me/small", token=token), lambda: by_environment(run, token, monkeypatch)):
        try:
            ask()
        except (UserError, RunError) as error:
            assert "secret" not in f"{error}{caplog.text}" and "token" in str(error).lower()
        else:
            raise AssertionError("a wrong token was taken")
    assert not hub.repos


def test_what_the_transport_says_is_not_repeated(run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise HfHubHTTPError.__bases__[0]("Illegal header value b'Bearer hf_secret'")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", broken)
    with pytest.raises(RunError, match=r"the upload to me/small broke off: HTTPError\."):
        push(run, "me/small")


def change_report(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    report = json.loads((folder / "llmprune.json").read_text())
    change(report)
    (folder / "llmprune.json").write_text(json.dumps(report))


def edit(hub: Hub, words: str, branch: str = "main") -> None:
    """What a person adds to the card on the Hub."""
    files = hub.files("me/small", branch)
    files["README.md"] += f"\n{words}\n".encode()


def by_environment(folder: Path, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    push(folder, "me/small")
