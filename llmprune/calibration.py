"""Text in, batches of tokens out: for calibration and for perplexity alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from llmprune.checkpoint.remote import trusted
from llmprune.texts import CORPORA, file_of, parse
from llmprune.types import UserError

# C4 is read from its first shards only: the whole of it is 800 GB.
C4_DOCUMENTS = 20_000
# The model whose text `demo` is.
DEMO_MODEL = Path(str(resources.files("llmprune.demo"))) / "model"
OF_THE_DEMO = (
    "the text is the demo's: stories for children, which suit hardly any other model; name one of the kind that the "
    "model is for, such as file:text.txt"
)


@dataclass(frozen=True)
class Tokens:
    """Sequences of token ids ready for the model, and where they came from.

    `sequences` may differ in length; padding has been removed, so none ever reaches a statistic.
    """

    sequences: list[torch.Tensor]
    source: str
    bos: bool
    warnings: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        return sum(len(one) for one in self.sequences)

    def digest(self) -> str:
        """A hash of the token ids, in order."""
        digest = hashlib.sha256()
        for one in self.sequences:
            digest.update(len(one).to_bytes(8, "little"))
            digest.update(one.to(torch.int64).numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What the report says of the text."""
        return {
            "source": self.source,
            "hash": self.digest(),
            "sequences": len(self.sequences),
            "tokens": self.total,
            "longest": max(len(one) for one in self.sequences),
            "bos": self.bos,
            "warnings": list(self.warnings),
        }

    def batches(self, size: int) -> list[torch.Tensor]:
        """At most `size` sequences a batch, all of one length, in a fixed order."""
        by_length: dict[int, list[torch.Tensor]] = {}
        for one in self.sequences:
            by_length.setdefault(len(one), []).append(one)
        return [
            torch.stack(group[start : start + size])
            for _, group in sorted(by_length.items(), reverse=True)
            for start in range(0, len(group), size)
        ]


def read_documents(spec: str, *, split: str = "train") -> list[str]:
    """The documents that a text SPEC names; raises UserError if it cannot be read.

    `file:PATH[:FIELD]` (.txt, .jsonl, .json, .parquet), `hub:DATASET[:CONFIG[:SPLIT[:FIELD]]]`,
    `wikitext2`, `c4`, `ptb`, or `demo`, the text that comes with the package.
    """
    rows, field, where = read_rows(spec, split=split)
    return _field(rows, field or "text", where)


def read_rows(spec: str, *, split: str = "train") -> tuple[Iterable[Any], str, object]:
    """What a SPEC names, not yet reduced to texts: rows (texts, or mappings), the field named in it, and its source.

    The field is "" where the SPEC names none. Raises UserError if nothing can be read.
    """
    text = parse(spec, split=split)
    if text.kind == "demo":
        return [resources.files("llmprune.demo").joinpath(text.name).read_text(encoding="utf-8")], text.field, spec
    if text.kind == "file":
        return _read_file(file_of(text)), text.field, text.name
    return _read_hub(text.name, text.config or None, text.split), text.field, text.name


def _read_file(path: Path) -> Iterable[Any]:
    try:
        if path.suffix == ".jsonl":
            # not splitlines(): a text may hold the other line ends that Unicode knows
            lines = path.read_text(encoding="utf-8").split("\n")
            return [json.loads(line) for line in lines if line.strip()]
        if path.suffix == ".json":
            rows: Iterable[Any] = json.loads(path.read_text(encoding="utf-8"))
            return rows
        if path.suffix == ".parquet":
            rows = _datasets("parquet files").load_dataset("parquet", data_files=str(path), split="train")
            return rows
        return [path.read_text(encoding="utf-8")]
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {error.object[error.start]:#x} at position {error.start}); convert it, "
            f"for example from Latin-1: iconv -f latin1 -t utf-8 {path}"
        ) from error
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as {path.suffix or 'text'}: {error}") from error


def _field(rows: Iterable[Any], field: str, path: object) -> list[str]:
    if not isinstance(rows, Iterable) or isinstance(rows, str | dict):
        raise UserError(f"{path} holds one {type(rows).__name__}, not a list of texts or of rows")
    documents = []
    for number, row in enumerate(rows, 1):
        text = row if isinstance(row, str) else row.get(field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            have = f"; it has {', '.join(map(str, row))}" if isinstance(row, dict) else ""
            raise UserError(f"row {number} of {path} has no text in the field {field!r}{have}; name it as SPEC:FIELD")
        documents.append(text)
    return documents


def _datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"reading {what} needs the package datasets: pip install 'llmprune[eval]'") from error
    return datasets


def _read_hub(dataset: str, config: str | None, split: str) -> list[Any]:
    library = _datasets(dataset)
    streaming = dataset == CORPORA["c4"][0]
    try:
        rows = library.load_dataset(dataset, config, split=split, streaming=streaming)
        return list(rows.take(C4_DOCUMENTS) if streaming else rows)
    except (ValueError, OSError, library.exceptions.DatasetsError) as error:
        raise UserError(f"the dataset {dataset!r} cannot be loaded: {error}") from error


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself begins a text with its BOS token."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a").input_ids[:1] == [bos]


def tokenize(documents: Sequence[str], tokenizer: Any) -> torch.Tensor:
    """All documents, joined by two newlines, as one row of ids without special tokens."""
    text = "\n\n".join(documents)
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int64)


def check_vocabulary(what: str, largest: int, embedding: Any) -> None:
    """Whether the model has a row for the largest token of `what`; raises UserError."""
    vocabulary = embedding.weight.shape[0]
    if largest >= vocabulary:
        raise UserError(
            f"{what} holds the token {largest}, but the model knows only {vocabulary}: "
            "the tokenizer does not belong to it"
        )


def windows(ids: torch.Tensor, length: int, bos: int | None) -> torch.Tensor:
    """Cut a row of ids into windows laid end to end, each begun with BOS if given; the rest is dropped."""
    fresh = length - (bos is not None)
    count = len(ids) // fresh
    cut = ids[: count * fresh].view(count, fresh)
    return cut if bos is None else torch.cat([torch.full((count, 1), bos), cut], 1)


def sample(
    spec: str,
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    seed: int,
    read: Callable[[str], list[str]] = read_documents,
) -> Tokens:
    """Draw `samples` windows of `length` tokens from the text that `spec` names.

    The text is cut end to end and windows are drawn without repeats, so no token counts twice.
    Fewer windows than asked for: all there are, with a warning. Less than one: UserError.
    """
    ids = tokenize(read(spec), tokenizer)
    bos = tokenizer.bos_token_id if adds_bos(tokenizer) else None
    cut = windows(ids, length, bos)
    if not len(cut):
        need = length - (bos is not None)
        raise UserError(
            f"the calibration text {spec!r} has {len(ids)} tokens, {need - len(ids)} too few for one sequence of "
            f"{length}; give more text, or a smaller --seqlen"
        )
    warnings = []
    if len(cut) < samples:
        warnings.append(
            f"the calibration text holds {len(cut)} sequences of {length} tokens, not {samples}; all are used"
        )
    order = torch.randperm(len(cut), generator=torch.Generator().manual_seed(seed))[:samples]
    return Tokens(list(cut[order]), spec, bos is not None, tuple(warnings))


def given(data: Any) -> Tokens:
    """Take token ids that the caller made: lists, a tensor, or mappings with input_ids and attention_mask.

    Positions that an attention mask excludes are removed here, once and for all. Raises UserError for
    what is no sequence of token ids.
    """
    if not isinstance(data, Iterable):
        raise UserError(f"calibration {data!r} is neither token ids nor a text SPEC in quotes, such as 'file:text.txt'")
    sequences = []
    for number, row in enumerate([data] if isinstance(data, Mapping) else data):
        fields = row if isinstance(row, Mapping) else {"input_ids": row}
        try:
            ids = torch.as_tensor(fields["input_ids"], dtype=torch.int64)
            rows = ids.unsqueeze(0) if ids.dim() == 1 else ids
            mask = fields.get("attention_mask")
            masks = torch.ones_like(rows) if mask is None else torch.as_tensor(mask).view(rows.shape)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"calibration item {number} holds no token ids ({error}); give lists or tensors of ids, or mappings "
                "with input_ids and perhaps attention_mask; for text, a SPEC such as file:text.txt"
            ) from error
        if rows.dim() != 2 or bool((rows < 0).any()):
            raise UserError(f"calibration item {number} must be a sequence, or a batch of them, of ids from 0")
        kept = [one[keep.bool()] for one, keep in zip(rows, masks, strict=True)]
        if any(not len(one) for one in kept):
            raise UserError(f"calibration sequence {number} is empty")
        sequences.extend(kept)
    if not sequences:
        raise UserError("the calibration data is empty")
    return Tokens(sequences, "token ids given by the caller", False)


def load_tokenizer(folder: Path | None, trust_remote_code: bool) -> Any:
    """The tokenizer of a model folder; raises UserError if there is none."""
    if folder is None:
        raise UserError("this model needs its tokenizer for text: pass tokenizer=, or calibration= as token ids")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted(folder, trust_remote_code))
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} has no usable tokenizer ({str(error).strip().splitlines()[0]}); put its files there, "
            "or give calibration data as token ids"
        ) from error


def longest(config: Any) -> int:
    """The most positions a model takes, from its configuration."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 1 << 20
