"""Every way to name a text, and what cannot be read."""

from __future__ import annotations

import builtins
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from llmprune import UserError, calibration

# Files.


def test_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\n  twö \n", encoding="utf-8")
    assert calibration.read_documents(f"file:{path}") == ["one\n\n  twö \n"]


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "other": "x"}\n\n{"other": "y", "text": "two\\nlines"}\n')
    assert calibration.read_documents(f"file:{path}") == ["one", "two\nlines"]
    assert calibration.read_documents(f"file:{path}:other") == ["x", "y"]


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": "one", "n": 1}, "two"]')
    assert calibration.read_documents(f"file:{path}") == ["one", "two"]


def test_a_colon_in_a_path(tmp_path: Path) -> None:
    path = tmp_path / "a:b.jsonl"
    path.write_text('{"text": "one", "q": "two"}')
    assert calibration.read_documents(f"file:{path}") == ["one"]
    assert calibration.read_documents(f"file:{path}:q") == ["two"]


@pytest.mark.parametrize(
    ("name", "content", "field", "says"),
    [
        ("a.jsonl", '{"text": "one"}\n{"body": "two", "n": 1}', "", "row 2 of .* no text in the field 'text'.*body, n"),
        ("a.jsonl", '{"text": "one"}', ":body", "row 1 of .* no text in the field 'body'; it has text; .*SPEC:FIELD"),
        ("a.jsonl", '{"text": null}', "", "row 1 of .* no text in the field 'text'"),
        ("a.jsonl", '{"text": ["one"]}', "", "row 1 of .* no text in the field 'text'"),
        ("a.jsonl", "[1, 2]", "", "row 1 of .* no text in the field 'text'"),
        ("a.jsonl", '{"text": "one"', "", "cannot be read as .jsonl"),
        ("a.json", "{", "", "cannot be read as .json"),
        ("a.json", "[3]", "", "row 1 of .* no text"),
        ("a.json", "null", "", "holds one NoneType, not a list"),
        ("a.json", "3", "", "holds one int, not a list"),
        ("a.json", '"one"', "", "holds one str, not a list"),
        # its keys are no documents
        ("a.json", '{"text": ["one", "two"]}', "", "holds one dict, not a list"),
    ],
)
def test_file_without_text(tmp_path: Path, name: str, content: str, field: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=says) as error:
        calibration.read_documents(f"file:{tmp_path / name}{field}")
    assert str(tmp_path / name) in str(error.value)


def test_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(UserError, match=r"a.txt is not UTF-8 \(byte 0xff at position 0\); convert it"):
        calibration.read_documents(f"file:{tmp_path}/a.txt")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for spec in (f"file:{tmp_path}/no.txt", f"file:{tmp_path}", f"file:{tmp_path}/no.jsonl:field"):
        with pytest.raises(UserError, match="there is no text file"):
            calibration.read_documents(spec)


def test_embedded_text_has_two_parts() -> None:
    train, test = (calibration.read_documents("demo", split=split) for split in ("train", "test"))
    assert len(train) == len(test) == 1
    assert len(train[0]) > 100_000 and len(test[0]) > 20_000
    # nothing is measured on what statistics come from
    assert not set(re.findall(r"[^.\n]{60,}\.", train[0])) & set(re.findall(r"[^.\n]{60,}\.", test[0]))


# The Hub, through a stand-in with the schema of the real library.

SPLITS = {
    ("Salesforce/wikitext", "wikitext-2-raw-v1"): {"train": "text", "validation": "text", "test": "text"},
    ("ptb-text-only/ptb_text_only", "penn_treebank"): {
        "train": "sentence",
        "validation": "sentence",
        "test": "sentence",
    },
    ("allenai/c4", "en"): {"train": "text", "validation": "text"},
    ("someone/notes", None): {"train": "text", "held-out": "body"},
    ("someone/notes", "long"): {"train": "text", "test": "text"},
}


class StreamedRows:
    """What `load_dataset(..., streaming=True)` gives: rows to iterate over and `take`, without a length."""

    def __init__(self, rows: Iterator[dict[str, str]]) -> None:
        self._rows = rows

    def take(self, count: int) -> list[dict[str, str]]:
        return [row for _, row in zip(range(count), self._rows, strict=False)]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A `datasets` module that knows SPLITS; the list it was asked for."""
    asked: list[tuple[Any, ...]] = []

    class DatasetsError(Exception):
        pass

    class DatasetNotFoundError(DatasetsError):
        pass

    def load_dataset(path: str, name: str | None = None, *, split: str, streaming: bool = False, **more: Any) -> Any:
        asked.append((path, name, split, streaming))
        if path == "parquet":
            rows = json.loads(Path(more["data_files"]).read_text())
            return rows
        if path not in {known for known, _ in SPLITS}:
            raise DatasetNotFoundError(f"Dataset '{path}' doesn't exist on the Hub or cannot be accessed.")
        if (path, name) not in SPLITS:
            raise ValueError(f"BuilderConfig {name!r} not found.")
        if split not in SPLITS[path, name]:
            raise ValueError(f'Unknown split "{split}".')
        field = SPLITS[path, name][split]
        rows = [{"id": str(number), field: f"{path} {name} {split} {number}"} for number in range(3)]
        if streaming:
            endless = ({field: f"{split} {number}"} for number in range(10**9))
            return StreamedRows(endless)
        return rows

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    module.exceptions = SimpleNamespace(DatasetsError=DatasetsError)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


@pytest.mark.parametrize(
    ("spec", "split", "asks"),
    [
        ("wikitext2", "train", ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", False)),
        ("wikitext2", "test", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", False)),
        ("ptb", "train", ("ptb-text-only/ptb_text_only", "penn_treebank", "train", False)),
        ("ptb", "test", ("ptb-text-only/ptb_text_only", "penn_treebank", "test", False)),
        ("hub:someone/notes", "train", ("someone/notes", None, "train", False)),
        ("hub:someone/notes:long", "test", ("someone/notes", "long", "test", False)),
        ("hub:someone/notes:long:test:text", "train", ("someone/notes", "long", "test", False)),
        ("hub:someone/notes::held-out:body", "train", ("someone/notes", None, "held-out", False)),
        ("hub:Salesforce/wikitext:wikitext-2-raw-v1:validation", "train",
         ("Salesforce/wikitext", "wikitext-2-raw-v1", "validation", False)),
    ],
)  # fmt: skip
def test_hub_datasets(hub: list[tuple[Any, ...]], spec: str, split: str, asks: tuple[Any, ...]) -> None:
    found = calibration.read_documents(spec, split=split)
    assert hub == [asks]
    assert found == [f"{asks[0]} {asks[1]} {asks[2]} {number}" for number in range(3)]


@pytest.mark.parametrize(("split", "asks"), [("train", "train"), ("test", "validation")])
def test_c4_is_streamed(hub: list[tuple[Any, ...]], split: str, asks: str) -> None:
    found = calibration.read_documents("c4", split=split)
    assert hub == [("allenai/c4", "en", asks, True)]
    assert len(found) == calibration.C4_DOCUMENTS and found[-1] == f"{asks} {len(found) - 1}"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("hub:nobody/nothing", "'nobody/nothing' cannot be loaded: .*doesn't exist"),
        ("hub:someone/notes:short", "'someone/notes' cannot be loaded: .*'short' not found"),
        ("hub:someone/notes::dev", "'someone/notes' cannot be loaded: .*dev"),
        ("hub:someone/notes::held-out", "row 1 of someone/notes has no text in the field 'text'; it has id, body"),
    ],
)
def test_hub_dataset_that_cannot_be_had(hub: list[tuple[Any, ...]], spec: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        calibration.read_documents(spec)


def test_parquet_goes_through_datasets(hub: list[tuple[Any, ...]], tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_text('[{"text": "one", "q": "two"}]')
    assert calibration.read_documents(f"file:{path}:q") == ["two"]
    assert hub == [("parquet", None, "train", False)]


@pytest.mark.parametrize("spec", ["wikitext2", "c4", "ptb", "hub:someone/notes", "file:a.parquet"])
def test_datasets_is_not_installed(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.chdir(tmp_path)
    real = builtins.__import__

    def without_datasets(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "datasets":
            raise ModuleNotFoundError("No module named 'datasets'", name=name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(UserError, match=r"needs the package datasets: pip install 'llmprune\[eval\]'"):
        calibration.read_documents(spec)


@pytest.mark.parametrize("spec", ["", "c5", "file:", "hub:", "text.txt", "http://example.org/a.txt"])
def test_what_is_no_spec(spec: str) -> None:
    with pytest.raises(UserError, match=r"is not understood.*file:PATH\[:FIELD\], hub:DATASET.*wikitext2, ptb, c4"):
        calibration.read_documents(spec)
