"""A checkpoint folder as it lies on disk: found, checked and read tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llmprune.types import RunError, UserError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SAMPLE_BYTES = 4096
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# What is fetched of a Hub repository, and what of a folder travels on to the pruned model.
COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*", "NOTICE*")


@dataclass(frozen=True)
class TensorEntry:
    """Where a stored tensor lies, from the file headers alone."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint:
    """Lazy access to the safetensors of a model folder. Nothing is read but what is asked for.

    Raises UserError for a folder that is no safetensors checkpoint, a truncated or corrupted file,
    an index that names a missing file or one outside the folder, and a pickle checkpoint.
    """

    def __init__(self, folder: Path, files: list[str] | None = None) -> None:
        self.folder = folder
        self.entries: dict[str, TensorEntry] = {}
        self.files = files or _weight_files(folder)
        for name in self.files:
            with _open(folder / name) as handle:
                for key in handle.keys():  # noqa: SIM118 (a safetensors handle is not iterable)
                    piece = handle.get_slice(key)
                    self.entries[key] = TensorEntry(
                        name, tuple(piece.get_shape()), _DTYPES.get(piece.get_dtype(), torch.uint8)
                    )
        self._handles: dict[str, Any] = {}

    @classmethod
    def of_file(cls, path: Path) -> Checkpoint:
        """A single safetensors file, wherever it lies."""
        return cls(path.parent, [path.name])

    def slice(self, key: str) -> Any:
        """The tensor `key`, not read yet: what transformers' loader takes."""
        return self._handle(self.entries[key].file).get_slice(key)

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor `key`, mapped from the file, in its stored dtype."""
        tensor: torch.Tensor = self._handle(self.entries[key].file).get_tensor(key)
        return tensor

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor with its key, one mapped at a time."""
        for key in self.entries:
            yield key, self.tensor(key)
            self.close()

    def close(self) -> None:
        """Unmap the files, so that their pages stop counting against this process."""
        self._handles.clear()

    def fingerprint(self) -> str:
        """A hash of config, headers, and a sample from the begin and the middle of every tensor.

        It changes when a tensor changes as a whole, as by training or pruning, but not with any single weight: reading
        all would take as long as a run.
        """
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for name in self.files:
            with (self.folder / name).open("rb") as file:
                header = file.read(int.from_bytes(head := file.read(8), "little"))
                digest.update(name.encode() + head + header)
                for key, entry in sorted(json.loads(header).items()):
                    begin, end = entry["data_offsets"] if key != "__metadata__" else (0, 0)
                    for place in (begin, (begin + end) // 2):
                        file.seek(8 + len(header) + place)
                        digest.update(file.read(min(SAMPLE_BYTES, end - place)))
        return digest.hexdigest()

    def _handle(self, name: str) -> Any:
        if name not in self._handles:
            try:
                self._handles[name] = _open(self.folder / name)
            except UserError as error:
                raise RunError(f"{self.folder / name} could be read when the run began: {error}") from error
        return self._handles[name]


def resolve(model: str, *, token: str | None = None) -> Path:
    """The local folder of `model`: a path, or a Hub id (`@REVISION` allowed) that is downloaded.

    Raises UserError if neither exists, or if the folder has no config.json.
    """
    path = Path(model).expanduser()
    if not path.is_dir():
        if path.exists():
            raise UserError(f"{model!r} is a file; give the folder that holds config.json and the weights")
        if model.count("/") > 1 or model.startswith((".", "/", "~")) or (path.parent.is_dir() and "/" not in model):
            raise UserError(f"there is no folder {model!r}")
        path = _download(model, token)
    if not (path / "config.json").is_file():
        raise UserError(f"{model!r} holds no config.json, so it is no Hugging Face model folder")
    return path


def hub_id(model: str) -> str | None:
    """What `resolve` takes for a Hub id (`@REVISION` included): None for a folder, and for no model at all."""
    return None if Path(model).expanduser().is_dir() else model


def companions(folder: Path, *, code: bool) -> list[Path]:
    """The files beside the weights that belong to the model: configs, tokenizer, licence, and its code if asked."""
    found = {path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()}
    skip = {INDEX_NAME, "llmprune.json"}
    return sorted(path for path in found if path.name not in skip and (code or path.suffix != ".py"))


def copy_companions(source: Path, target: Path, *, code: bool) -> None:
    """Put the files beside a model's weights into another folder."""
    # config.json last: without it nothing takes the folder for a model
    for path in sorted(companions(source, code=code), key=lambda path: path.name == "config.json"):
        shutil.copyfile(path, target / path.name)


def _download(model: str, token: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repo, _, revision = model.partition("@")
    try:
        return Path(
            snapshot_download(
                repo, revision=revision or None, token=token, allow_patterns=["*.safetensors", *COMPANIONS]
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{model!r} is neither a folder nor a model that the Hub gives us: {reason}") from error


def _weight_files(folder: Path) -> list[str]:
    index = folder / INDEX_NAME
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{index} is not a safetensors index: {error}") from error
        for name in names:
            _check_inside(folder, name)
        return names
    if (folder / SINGLE_NAME).is_file():
        return [SINGLE_NAME]
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder} holds a pickle checkpoint ({pickles[0]}), which can run code when read and is refused. "
            "Convert it once, where you trust it: "
            f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(NEW_FOLDER)"
        )
    raise UserError(f"{folder} holds no weights: neither {SINGLE_NAME} nor {INDEX_NAME} is there")


def _check_inside(folder: Path, name: object) -> None:
    if not isinstance(name, str) or os.path.isabs(name) or ".." in Path(name).parts:
        raise UserError(f"{folder / INDEX_NAME} names the file {name!r} outside its folder; it is refused")
    if not os.path.isfile(folder / name):
        raise UserError(f"{folder / INDEX_NAME} names {name!r}, which is missing; download the model again")


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or corrupted ({error}); download it again") from error


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
