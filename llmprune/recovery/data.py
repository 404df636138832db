"""Texts and conversations as packed sequences with labels, and the part of them that is held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from llmprune import calibration
from llmprune.recovery.recipe import Data
from llmprune.types import UserError

# Label of a token that is no part of the loss, as torch's cross entropy has it.
IGNORED = -100
# Names under which instruction sets keep a request and its answer; the first pair that a row has counts.
PAIRS = (
    ("prompt", "response"),
    ("prompt", "answer"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
)
# The form that LLM-Pruner's and Alpaca's sets are trained in, for tokenizers without a chat template.
REQUEST, RESPONSE = "### Instruction:\n", "### Response:\n"

Message = dict[str, str]
# A stretch of tokens, and whether they are part of the loss.
Piece = tuple[list[int], bool]


@dataclass(frozen=True)
class Sequences:
    """N sequences of T tokens; `labels_NT` is IGNORED where a token is no part of the loss."""

    ids_NT: torch.Tensor
    labels_NT: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids_NT)

    def scored(self) -> int:
        """How many tokens are predicted: every label but those at the start of a sequence."""
        return int((self.labels_NT[:, 1:] != IGNORED).sum())

    def digest(self) -> str:
        """A hash of the token ids."""
        return hashlib.sha256(self.ids_NT.numpy().tobytes()).hexdigest()

    def rows(self, numbers: list[int]) -> Sequences:
        return Sequences(self.ids_NT[numbers], self.labels_NT[numbers])


@dataclass(frozen=True)
class Corpus:
    """What is trained on and what is held out, and what they were made of."""

    train: Sequences
    held_out: Sequences
    form: str

    def digest(self) -> str:
        """A hash of all token ids and labels."""
        digest = hashlib.sha256()
        for one in (self.train, self.held_out):
            digest.update(one.ids_NT.numpy().tobytes())
            digest.update(one.labels_NT.numpy().tobytes())
        return digest.hexdigest()


def read_corpus(data: Data, tokenizer: Any, length: int) -> Corpus:
    """The corpus that `data` names, in sequences of `length` tokens; raises UserError.

    Texts are joined and cut end to end, as for calibration. Rows that hold a conversation (`messages`) or one of
    `PAIRS` are instruction data: only responses are part of the loss.
    """
    rows, field, _ = calibration.read_rows(data.source)
    known = list(rows) if not field and not isinstance(rows, str | dict) else []
    if known and all(isinstance(row, dict) and _is_conversation(row) for row in known):
        examples = [encode(conversation(row), tokenizer) for row in known]
        cut = len(examples) - max(1, round(data.held_out * len(examples)))
        parts = [pack(part, length, tokenizer) for part in (examples[:cut], examples[cut:])]
        form = "conversations, " + ("chat template" if tokenizer.chat_template else "instruction headings")
    else:
        ids = calibration.tokenize(calibration.read_documents(data.source), tokenizer)
        bos = tokenizer.bos_token_id if calibration.adds_bos(tokenizer) else None
        windows_NT = calibration.windows(ids, length, bos)
        cut = len(windows_NT) - max(1, round(data.held_out * len(windows_NT)))
        parts = [Sequences(part, part) for part in (windows_NT[:cut], windows_NT[cut:])]
        form = "text"
    train, held_out = parts
    if not train.scored() or not held_out.scored():
        raise UserError(
            f"the text {data.source!r} is too short: {len(train)} sequences of {length} tokens to train on and "
            f"{len(held_out)} held out; give more text, or a smaller data.seqlen"
        )
    return Corpus(train, held_out, form)


def conversation(row: dict[str, Any]) -> list[Message]:
    """The messages of a row, in the form that chat templates take; raises UserError for a row that holds none."""
    if "messages" in row:
        return [{"role": one["role"], "content": one["content"]} for one in row["messages"]]
    pair = _pair(row)
    if pair is None:
        raise UserError(f"a row with the fields {', '.join(row)} holds neither messages nor a request and its answer")
    more = row.get("input") or row.get("context")
    request = f"{row[pair[0]]}\n\n{more}" if more else row[pair[0]]
    return [{"role": "user", "content": request}, {"role": "assistant", "content": row[pair[1]]}]


def encode(messages: list[Message], tokenizer: Any) -> list[Piece]:
    """A conversation as stretches of tokens, the responses marked.

    Prompt and response are tokenized apart, so that the border between them is exact.
    """
    text = _templated if tokenizer.chat_template else _headed
    pieces: list[Piece] = []
    done = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = text(messages[:number], tokenizer, True), text(messages[: number + 1], tokenizer, False)
        if not (before.startswith(done) and after.startswith(before)):
            raise UserError("the chat template rewrites earlier turns, so the responses in it cannot be told apart")
        pieces += [(_ids(before[len(done) :], tokenizer), False), (_ids(after[len(before) :], tokenizer), True)]
        done = after
    if not tokenizer.chat_template:
        bos = [tokenizer.bos_token_id] if calibration.adds_bos(tokenizer) else []
        pieces = [(bos, False), *pieces]
    return pieces


def pack(examples: Iterable[list[Piece]], length: int, tokenizer: Any) -> Sequences:
    """Put whole examples one after the other into sequences of `length` tokens; what is longer loses its end.

    What stays free at the end of a sequence is filled and no part of the loss; nothing before it can see it.
    """
    fill = next(one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if one is not None)
    ids: list[list[int]] = []
    labels: list[list[int]] = []
    for example in examples:
        tokens = [token for piece, _ in example for token in piece][:length]
        marks = [token if response else IGNORED for piece, response in example for token in piece][:length]
        # the first token of an example cannot be foretold from the one before it
        marks[:1] = [IGNORED]
        if not ids or len(ids[-1]) + len(tokens) > length:
            ids.append([])
            labels.append([])
        ids[-1] += tokens
        labels[-1] += marks
    shape = (len(ids), length)
    return Sequences(
        torch.tensor([row + [fill] * (length - len(row)) for row in ids], dtype=torch.int64).view(shape),
        torch.tensor([row + [IGNORED] * (length - len(row)) for row in labels], dtype=torch.int64).view(shape),
    )


def _is_conversation(row: dict[str, Any]) -> bool:
    return "messages" in row or _pair(row) is not None


def _pair(row: dict[str, Any]) -> tuple[str, str] | None:
    return next((pair for pair in PAIRS if all(isinstance(row.get(one), str) for one in pair)), None)


def _ids(text: str, tokenizer: Any) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return found


def _templated(messages: list[Message], tokenizer: Any, prompt: bool) -> str:
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    return text


def _headed(messages: list[Message], tokenizer: Any, prompt: bool) -> str:
    parts = []
    for message in messages:
        answer = message["role"] == "assistant"
        end = (tokenizer.eos_token or "\n") if answer else "\n\n"
        parts.append(f"{RESPONSE if answer else REQUEST}{message['content']}{end}")
    return "".join(parts) + (RESPONSE if prompt else "")
