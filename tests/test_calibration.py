"""Text in, batches of tokens out: every way to name a text, and the rule by which windows are cut and drawn."""

from __future__ import annotations

import builtins
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from letters import Letters, NoSpecial
from transformers import BatchEncoding

from llmprune import UserError, calibration

PLAIN, WITH_BOS = Letters(bos=False), Letters(bos=True)


def sample(text: list[str], tokenizer: Any = PLAIN, **changes: int) -> calibration.Tokens:
    settings = {"samples": 4, "length": 8, "seed": 0} | changes
    return calibration.sample("spec", tokenizer, read=lambda _: text, **settings)


def rows(tokens: calibration.Tokens) -> list[list[int]]:
    return [one.tolist() for one in tokens.sequences]


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
    with pytest.raises(UserError, match=r"a.txt cannot be read as .txt"):
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


# Text to tokens to windows.


def test_documents_are_joined_by_two_newlines() -> None:
    # empty ones too: the rows of WikiText are lines, and published perplexities count the empty ones
    ids = calibration.tokenize(["ab", "", "c\n", "d"], WITH_BOS)
    assert "".join(map(chr, ids.tolist())) == "ab\n\n\n\nc\n\n\nd"


def test_windows_are_consecutive_pieces_of_the_text() -> None:
    text = "abcdefghijklmnopqrstuvwxyz"
    found = rows(sample([text], samples=100, length=8))
    assert sorted("".join(map(chr, row)) for row in found) == ["abcdefgh", "ijklmnop", "qrstuvwx"]


def test_bos_begins_every_window_if_the_tokenizer_adds_it() -> None:
    text = "abcdefghijklmnopqrstuvwxyz"
    tokens = sample([text], WITH_BOS, samples=100, length=8)
    assert tokens.bos
    assert {row[0] for row in rows(tokens)} == {1} and {len(row) for row in rows(tokens)} == {8}
    assert sorted("".join(map(chr, row[1:])) for row in rows(tokens)) == ["abcdefg", "hijklmn", "opqrstu"]


@pytest.mark.parametrize("tokenizer", [PLAIN, NoSpecial(bos=False)])
def test_no_bos_if_the_tokenizer_adds_none(tokenizer: Letters) -> None:
    tokens = sample(["a" * 100], tokenizer)
    assert not tokens.bos
    assert all(1 not in row for row in rows(tokens))


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(9, 400),
    samples=st.integers(1, 30),
    length=st.integers(2, 9),
    seed=st.integers(0, 2**63 - 1),
    bos=st.booleans(),
)
def test_windows_never_repeat_or_overlap(count: int, samples: int, length: int, seed: int, bos: bool) -> None:
    # every token of the text is another one
    text = "".join(map(chr, range(1000, 1000 + count)))
    tokens = sample([text], Letters(bos=bos), samples=samples, length=length, seed=seed)
    fresh = length - bos
    have = count // fresh
    assert len(tokens.sequences) == min(samples, have)
    assert tokens.total == len(tokens.sequences) * length
    starts = []
    for row in rows(tokens):
        assert row[:bos] == [1] * bos
        piece = row[bos:]
        assert piece == list(range(piece[0], piece[0] + fresh))
        starts.append(piece[0] - 1000)
    assert len(set(starts)) == len(starts) and all(start % fresh == 0 for start in starts)
    assert bool(tokens.warnings) == (have < samples)


def test_fewer_windows_than_asked_for() -> None:
    tokens = sample(["a" * 30], samples=10, length=8)
    assert len(tokens.sequences) == 3
    (warning,) = tokens.warnings
    assert "holds 3 sequences of 8 tokens, not 10" in warning and "all are used" in warning
    assert not sample(["a" * 30], samples=3, length=8).warnings


@pytest.mark.parametrize(("tokenizer", "need"), [(PLAIN, 8), (WITH_BOS, 7)])
def test_less_than_one_window(tokenizer: Letters, need: int) -> None:
    with pytest.raises(UserError, match=rf"'spec' has {need - 1} tokens, 1 too few for one sequence of 8.*--seqlen"):
        sample(["a" * (need - 1)], tokenizer)
    assert len(sample(["a" * need], tokenizer, samples=1).sequences) == 1
    with pytest.raises(UserError, match=rf"has 0 tokens, {need} too few"):
        sample([], tokenizer)


def test_the_seed_decides() -> None:
    text = ["".join(map(chr, range(1000, 3000)))]
    first, again, other = (sample(text, samples=20, seed=seed) for seed in (3, 3, 4))
    assert rows(first) == rows(again) and first.digest() == again.digest()
    assert rows(first) != rows(other) and first.digest() != other.digest()
    # not simply the beginning of the text, and in no order of the text
    begins = [row[0] for row in rows(first)]
    assert begins != sorted(begins) and max(begins) > 2000


def test_the_seed_is_independent_of_the_global_one() -> None:
    text = ["".join(map(chr, range(1000, 3000)))]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = rows(sample(text))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert rows(sample(text)) == first


def test_digest_is_of_ids_and_lengths() -> None:
    def digest(*sequences: list[int]) -> str:
        return calibration.Tokens([torch.tensor(one) for one in sequences], "", False).digest()

    expected = hashlib.sha256()
    for numbers in (2, 5, 6), (1, 7):
        for number in numbers:
            expected.update(number.to_bytes(8, "little"))
    assert digest([5, 6], [7]) == expected.hexdigest()
    assert len({digest([5, 6], [7]), digest([5], [6, 7]), digest([7], [5, 6]), digest([5, 6, 7])}) == 4


# Batches.


def test_batches_hold_sequences_of_one_length() -> None:
    lengths = [5, 3, 5, 7, 3, 5, 5, 5]
    sequences = [torch.full((length,), number) for number, length in enumerate(lengths)]
    batches = calibration.Tokens(sequences, "", False).batches(2)
    assert [tuple(one.shape) for one in batches] == [(1, 7), (2, 5), (2, 5), (1, 5), (2, 3)]
    # the order within a length is that of the sequences, and none is lost
    assert [int(row[0]) for batch in batches for row in batch] == [3, 0, 2, 5, 6, 7, 1, 4]


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=20), size=st.integers(1, 6))
def test_batches_lose_nothing(lengths: list[int], size: int) -> None:
    sequences = [torch.full((length,), number) for number, length in enumerate(lengths)]
    batches = calibration.Tokens(sequences, "", False).batches(size)
    assert all(1 <= len(batch) <= size for batch in batches)
    found = sorted((row.tolist() for batch in batches for row in batch), key=lambda row: row[0])
    assert found == [one.tolist() for one in sequences]


# Tokens that the caller made.


@pytest.mark.parametrize(
    "data",
    [
        [[5, 6, 7], [8, 9, 10]],
        torch.tensor([[5, 6, 7], [8, 9, 10]]),
        [torch.tensor([5, 6, 7]), torch.tensor([[8, 9, 10]])],
        [{"input_ids": [5, 6, 7]}, {"input_ids": torch.tensor([[8, 9, 10]])}],
        [{"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]]), "attention_mask": torch.ones(2, 3)}],
        ({"input_ids": row} for row in ([5, 6, 7], [8, 9, 10])),
        BatchEncoding({"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]]), "attention_mask": torch.ones(2, 3)}),
        [BatchEncoding({"input_ids": [5, 6, 7]}), BatchEncoding({"input_ids": [8, 9, 10]})],
    ],
    ids=["lists", "tensor", "tensors", "dicts", "batch", "generator", "encoding", "encodings"],
)
def test_given_tokens(data: Any) -> None:
    tokens = calibration.given(data)
    assert rows(tokens) == [[5, 6, 7], [8, 9, 10]]
    assert tokens.total == 6 and not tokens.bos
    assert all(one.dtype == torch.int64 for one in tokens.sequences)


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_padding_is_removed(kind: torch.dtype) -> None:
    ids = torch.tensor([[5, 6, 7, 0], [0, 0, 8, 9], [1, 2, 3, 4]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 0, 1, 1]]).to(kind)
    tokens = calibration.given([{"input_ids": ids, "attention_mask": mask}])
    assert rows(tokens) == [[5, 6, 7], [8, 9], [1, 3, 4]]
    by_row = calibration.given([{"input_ids": i, "attention_mask": m} for i, m in zip(ids, mask, strict=True)])
    assert by_row.digest() == tokens.digest()
    assert [tuple(one.shape) for one in tokens.batches(8)] == [(2, 3), (1, 2)]


def test_zero_is_a_token_like_any_other() -> None:
    assert rows(calibration.given([[0, 0, 5]])) == [[0, 0, 5]]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "calibration data is empty"),
        ([[5], []], "sequence 1 is empty"),
        ([{"input_ids": [5, 6], "attention_mask": [0, 0]}], "sequence 0 is empty"),
        (["some text"], "item 0 holds no token ids .*file:text.txt"),
        ([[5, 6], {"text": "some"}], "item 1 holds no token ids .*input_ids"),
        ([[[5, 6], [7]]], "item 0 holds no token ids"),
        ([{"input_ids": [5, 6], "attention_mask": [1]}], "item 0 holds no token ids"),
        ([5, 6, 7], "item 0 must be a sequence"),
        ([[5, -100]], "item 0 must be a sequence.* from 0"),
    ],
)
def test_given_nothing(data: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        calibration.given(data)
