"""The folder a run writes: durable, resumable, and never half-finished under its final name.

Everything goes to `DIR.partial/`: one safetensors file a unit, and a journal that says which units
are whole. When all is there, the report is written, and from then on only the final name is missing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from llmprune import interruption
from llmprune.checkpoint.source import INDEX_NAME, SINGLE_NAME, Checkpoint
from llmprune.types import RunError, UserError

REPORT_NAME = "llmprune.json"
JOURNAL_NAME = "journal.jsonl"
LOCK_NAME = "lock"
# Where the output that is overwritten waits in the new one, until that has its final name.
REPLACED_NAME = "replaced"
PARTS = "model-*-of-*.safetensors"
# Below this many bytes the parts are joined into one file, as a user expects of a small model.
JOIN_BYTES = 128 * 2**20


class Output:
    """The output of one run: `claim` the folder, `open` it when something is to be written, `finish` it."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder.expanduser().resolve()
        self.partial = self.folder.parent / (self.folder.name + ".partial")
        self.fingerprint = fingerprint
        # what a run needs between its beginning and its end; it goes when the folder is finished
        self.scratch = self.partial / "scratch"
        self.records: dict[str, dict[str, Any]] = {}
        self._lock: Any = None
        self._lines: list[dict[str, Any]] = []  # of the journal, if it is this run's

    def check(self, *, source: Path | None, resume: bool, overwrite: bool) -> None:
        """Refuse, before any work, what must not be written over; raises UserError."""
        read = None if source is None else source.resolve()
        for written in (self.folder, self.partial):
            if read is not None and (written == read or read in written.parents):
                raise UserError(f"the output {self.folder} lies in the input folder, which is never written to")
            if read is not None and written in read.parents:
                raise UserError(f"the input lies in the output {self.folder}; choose another --out")
        if self.folder.exists() and not overwrite and not (resume and self.is_finished()):
            raise UserError(f"{self.folder} exists; choose another --out, or pass --overwrite to replace it")
        if self.folder.exists() and not (self.folder / "config.json").is_file() and not _is_empty(self.folder):
            raise UserError(f"{self.folder} holds something other than a model; --overwrite does not remove that")
        if not self._is_untouched() and not resume and not overwrite:
            raise UserError(
                f"{self.partial} holds an unfinished run; pass --resume to go on with it, or --overwrite to start again"
            )
        parent = next(one for one in self.folder.parents if one.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise UserError(f"{parent} cannot be written to; choose another --out")

    def is_finished(self) -> bool:
        """Whether the final folder holds the very run that is asked for."""
        return _fingerprint_in(self.folder) == self.fingerprint

    def claim(self, *, resume: bool) -> bool:
        """Lock the partial folder; whether the run is finished already, so that nothing is left to do.

        What lies there stays as it is. Only a run that was killed when all but its final name was there gets that name.
        Raises UserError if another run is writing there, or if what is to be resumed is another run.
        """
        if resume and self.is_finished():
            self._tidy()
            return True
        self._take_lock()
        if not resume:
            return False
        complete, self._lines = _fingerprint_in(self.partial), self._read_journal()
        begun = complete or (self._lines[0]["fingerprint"] if self._lines else None)
        if begun not in (None, self.fingerprint):
            raise UserError(
                f"{self.partial} was begun with another recipe, model, calibration text or version; "
                "repeat that run's options to resume it, or pass --overwrite to start again"
            )
        if complete:
            self._publish()
        return complete is not None

    def open(self) -> None:
        """Begin to write in the claimed folder, or go on with what is there of this run."""
        if not self._lines:
            self._clear()
            self._append({"fingerprint": self.fingerprint})
        self.records = {line["unit"]: line for line in self._lines[1:] if self._is_whole(line)}

    def write(
        self, unit: str, place: tuple[int, int], tensors: dict[str, torch.Tensor], record: dict[str, Any]
    ) -> None:
        """Write the tensors of a unit, check them against the bytes on disk, and enter it in the journal.

        `place`: the number of this file, from 1, and how many there will be.
        """
        interruption.check()
        line = self._line(unit, place, tensors, record)
        if tensors:
            self._save(line["file"], tensors)
            self._compare(line["file"], tensors)
            line["sha256"] = _digest(self.partial / line["file"])
        self._append(line)
        self.records[unit] = line

    def note(self, name: str, record: dict[str, Any]) -> None:
        """Enter something in the journal that a resumed run must know, and that is no unit."""
        self.write(name, (0, 0), {}, record)

    def _line(
        self, unit: str, place: tuple[int, int], tensors: dict[str, torch.Tensor], record: dict[str, Any]
    ) -> dict[str, Any]:
        name = f"model-{place[0]:05d}-of-{place[1]:05d}.safetensors" if tensors else None
        return {"unit": unit, "file": name, "bytes": _size(tensors), **record}

    def written(self, unit: str) -> Checkpoint | None:
        """The stored tensors of a finished unit, for running through it again."""
        name = self.records[unit]["file"]
        return Checkpoint.of_file(self.partial / name) if name else None

    def finish(
        self,
        add_files: Callable[[Path], None],
        describe: Callable[[Path], dict[str, Any]],
    ) -> None:
        """Complete the folder and rename it to its final name.

        `add_files` puts config and tokenizer beside the weights, `describe` checks the folder and
        returns the report, which says that all is there. What is killed before that can be repeated, as the parts
        are still there; what is killed after it needs no more than `claim`.
        """
        try:
            self._join_or_index()
            add_files(self.partial)
            report = {"fingerprint": self.fingerprint, **describe(self.partial)}
            interruption.check()
            write_json(self.partial / REPORT_NAME, report)
        except BaseException as error:
            # without its config nothing takes the folder for a model
            (self.partial / "config.json").unlink(missing_ok=True)
            if isinstance(error, OSError | SafetensorError):
                raise RunError(f"cannot complete {self.partial}: {error}") from error
            raise
        self._publish()

    def close(self) -> None:
        """Let go of the folder, which goes if nothing was written to it."""
        if self._lock is None:
            return
        if self._is_untouched():
            shutil.rmtree(self.partial, ignore_errors=True)
        self._release()

    def _take_lock(self) -> None:
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock = (self.partial / LOCK_NAME).open("w")
        except OSError as error:
            raise RunError(f"cannot create {self.partial}: {error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._release()
            raise UserError(
                f"another run is writing to {self.partial}; wait for it, or choose another --out"
            ) from error

    def _release(self) -> None:
        """Give up the lock: a kept exception can keep this object alive, and with it an open file."""
        self._lock.close()
        self._lock = None

    def _is_untouched(self) -> bool:
        """Whether a run has claimed the partial folder, but written nothing to it."""
        return {path.name for path in self.partial.glob("*")} <= {LOCK_NAME}

    def _publish(self) -> None:
        """Give the complete partial folder its final name; if killed on the way, `claim` does the rest."""
        if (self.partial / SINGLE_NAME).is_file():
            for part in self.partial.glob(PARTS):
                part.unlink()
        (self.partial / JOURNAL_NAME).unlink(missing_ok=True)
        shutil.rmtree(self.scratch, ignore_errors=True)
        if self.folder.exists():
            shutil.rmtree(self.partial / REPLACED_NAME, ignore_errors=True)
            self.folder.rename(self.partial / REPLACED_NAME)
        self.partial.rename(self.folder)
        # only now: until here a second run must find the folder locked
        self._tidy()
        self._release()

    def _tidy(self) -> None:
        """Remove from the final folder what is of no use there."""
        with contextlib.suppress(OSError):
            (self.folder / LOCK_NAME).unlink(missing_ok=True)
        shutil.rmtree(self.folder / REPLACED_NAME, ignore_errors=True)

    def _clear(self) -> None:
        """Empty the partial folder, but for the lock and the output that a killed run was replacing."""
        for path in self.partial.iterdir():
            if path.name in (LOCK_NAME, REPLACED_NAME):
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _join_or_index(self) -> None:
        """Make the parts a checkpoint: one joined file if they are small, else an index over them."""
        parts = {line["file"]: Checkpoint.of_file(self.partial / line["file"]) for line in self._with_files()}
        total = sum(line["bytes"] for line in self._with_files())
        if not parts:
            return
        if total <= JOIN_BYTES:
            # one of an earlier attempt would take room beside the new one
            (self.partial / SINGLE_NAME).unlink(missing_ok=True)
            self._save(SINGLE_NAME, {key: part.tensor(key) for part in parts.values() for key in part.entries})
            return
        weight_map = {key: name for name, part in parts.items() for key in part.entries}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (self.partial / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n")

    def _with_files(self) -> list[dict[str, Any]]:
        return sorted((line for line in self.records.values() if line["file"]), key=lambda line: str(line["file"]))

    def _save(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        path = self.partial / name
        temporary = path.with_suffix(".writing")
        try:
            save_file({key: one.contiguous() for key, one in tensors.items()}, temporary, metadata={"format": "pt"})
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.rename(path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise RunError(f"cannot write {path}: {error}") from error

    def _compare(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        stored = Checkpoint.of_file(self.partial / name)
        for key, tensor in tensors.items():
            found = stored.tensor(key)
            if found.dtype != tensor.dtype or not torch.equal(_bits(found), _bits(tensor.cpu())):
                raise RunError(f"{self.partial / name} does not hold the tensor {key!r} that was written to it")

    def _append(self, line: dict[str, Any]) -> None:
        try:
            with (self.partial / JOURNAL_NAME).open("a") as file:
                file.write(_sealed(line))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"cannot write the journal in {self.partial}: {error}") from error

    def _read_journal(self) -> list[dict[str, Any]]:
        """The whole lines of the journal, up to the first that is none: a kill may have torn the last one."""
        path = self.partial / JOURNAL_NAME
        if not path.is_file():
            return []
        text = path.read_text(errors="replace")
        lines: list[dict[str, Any]] = []
        for written in text.splitlines():
            try:
                line = json.loads(written)
                sealed = isinstance(line, dict) and line.pop("crc32", None) == _crc32(line)
            except (ValueError, RecursionError):
                break
            if not sealed or not (_is_part(line) if lines else "fingerprint" in line):
                break
            lines.append(line)
        whole = "".join(map(_sealed, lines))
        if whole != text:
            try:
                cut = path.with_suffix(".writing")
                cut.write_text(whole)
                cut.rename(path)
            except OSError as error:
                raise RunError(f"cannot mend the journal in {self.partial}: {error}") from error
        return lines

    def _is_whole(self, line: dict[str, Any]) -> bool:
        """Whether the file of a journal line is there and complete."""
        if line["file"] is None:
            return True
        try:
            return bool(_digest(self.partial / line["file"]) == line["sha256"])
        except OSError:
            return False


def check_file(path: Path) -> None:
    """Whether a result can be written to a file once it is there; raises UserError."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--out {path} must be a file in a folder that exists and can be written to")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all; raises RunError."""
    temporary = path.with_name(f"{path.name}.writing")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error}") from error


def record(folder: Path, key: str, value: Any) -> None:
    """Enter something in the report of a finished model; raises RunError."""
    path = folder / REPORT_NAME
    write_json(path, {**json.loads(path.read_text()), key: value})


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report in a folder; None if it holds none that can be read."""
    try:
        report = json.loads((folder / REPORT_NAME).read_text())
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) else None


def _fingerprint_in(folder: Path) -> str | None:
    """Of which run a folder holds the report, and so the complete result."""
    return (read_report(folder) or {}).get("fingerprint")


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as bytes: NaN equals itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _size(tensors: dict[str, torch.Tensor]) -> int:
    return sum(one.nbytes for one in tensors.values())


def _is_part(line: dict[str, Any]) -> bool:
    """Whether a line of the journal is one of ours: about a unit, and its file if it has one."""
    if not isinstance(line.get("unit"), str) or "file" not in line:
        return False
    name = line["file"]
    return name is None or (
        isinstance(name, str)
        and re.fullmatch(r"model-\d{5,}-of-\d{5,}\.safetensors", name) is not None
        and isinstance(line.get("bytes"), int)
        and isinstance(line.get("sha256"), str)
    )


def _sealed(line: dict[str, Any]) -> str:
    """A line as it is written: with a checksum, so that a damaged one is not taken for another."""
    return json.dumps({**line, "crc32": _crc32(line)}) + "\n"


def _crc32(line: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(line).encode())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
