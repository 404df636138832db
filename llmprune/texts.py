"""What a text SPEC names: told apart without reading it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmprune.types import UserError

# Hub datasets behind the short names: (dataset, config, train split, evaluation split, field).
CORPORA = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "test", "text"),
    "ptb": ("ptb-text-only/ptb_text_only", "penn_treebank", "train", "test", "sentence"),
    "c4": ("allenai/c4", "en", "train", "validation", "text"),
}


@dataclass(frozen=True)
class Text:
    """A file of ours or the user's, or a split of a dataset; "" for what the SPEC leaves open."""

    kind: Literal["demo", "file", "hub"]
    name: str
    config: str = ""
    split: str = ""
    field: str = ""


def parse(spec: str, *, split: str) -> Text:
    """What `spec` names if it is read for `split`, "train" or "test"; raises UserError if it is no SPEC."""
    if spec == "demo":
        return Text("demo", "calibration.txt" if split == "train" else "eval.txt")
    kind, _, rest = spec.partition(":")
    if kind == "file" and rest:
        path, colon, field = rest.rpartition(":")
        return Text("file", path, field=field) if colon and not Path(rest).is_file() else Text("file", rest)
    if spec in CORPORA:
        dataset, config, train, evaluation, field = CORPORA[spec]
        return Text("hub", dataset, config, train if split == "train" else evaluation, field)
    if kind == "hub" and rest:
        dataset, config, chosen, field = [*rest.split(":"), "", "", ""][:4]
        return Text("hub", dataset, config, chosen or split, field)
    hint = f"; for a file write file:{spec}" if Path(spec).exists() else ""
    raise UserError(
        f"text {spec!r} is not understood{hint}. Give file:PATH[:FIELD], hub:DATASET[:CONFIG[:SPLIT[:FIELD]]], "
        f"{', '.join(CORPORA)} or demo"
    )


def file_of(text: Text) -> Path:
    """The file of the user's that is named; raises UserError if there is none."""
    path = Path(text.name)
    if not path.is_file():
        raise UserError(f"there is no text file {str(path)!r}")
    return path


def same(training: str, evaluation: str) -> bool:
    """Whether what is read of one SPEC for training is what is read of the other for evaluation, or rows of it.

    Relative paths are taken from the current folder. False for what is no SPEC, such as a note on given token ids.
    """
    try:
        return _place(parse(training, split="train")) == _place(parse(evaluation, split="test"))
    except UserError:
        return False


def _place(text: Text) -> tuple[str, ...]:
    """Where the rows lie; other fields of the same rows are no other text."""
    name = str(Path(text.name).resolve()) if text.kind == "file" else text.name
    return text.kind, name, text.config, text.split


def digest_of(spec: str) -> str:
    """What tells a text from another: its SPEC, and for a file of the user's, which may change, its bytes too.

    Raises UserError if there is no such file.
    """
    text = parse(spec, split="train")
    if text.kind != "file":
        return spec
    return f"{spec} {hashlib.sha256(file_of(text).read_bytes()).hexdigest()}"
