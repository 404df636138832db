"""Batches of tokens out of texts, and the rule by which windows are cut and drawn."""

from __future__ import annotations

import hashlib
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
