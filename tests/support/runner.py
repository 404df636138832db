"""Runs of the command line: in this process, in a forked child that can be killed, or as a true process.

In-process and forked runs use the real `main` of the program, with its exit code, its stdout and its
stderr; they only save the seconds of importing torch and transformers anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llmprune.cli  # noqa: F401 (once, before any fork)
from llmprune import __main__ as program


@dataclass(frozen=True)
class Ran:
    """How a run ended. A traceback, where there was one, is part of `err`, as it would be on a terminal."""

    code: int
    out: str
    err: str


def cli(*arguments: object) -> Ran:
    """`llmprune ARGUMENTS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = _main(arguments)
    return Ran(code, out.getvalue(), err.getvalue())


def process(*arguments: object, timeout: float = 120) -> Ran:
    """`python -m llmprune ARGUMENTS` as a process of its own."""
    command = [sys.executable, "-m", "llmprune", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    return Ran(done.returncode, done.stdout, done.stderr)


class Forked:
    """`llmprune ARGUMENTS` in a child of this process, to be killed or interrupted.

    `before` runs in the child first and may change it: nothing of that is seen here.
    """

    def __init__(self, *arguments: object, log: Path, before: Callable[[], Any] | None = None) -> None:
        self._out, self._err = log.with_suffix(".out"), log.with_suffix(".err")
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                for number, path in ((1, self._out), (2, self._err)):
                    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
                sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
                # whoever started the tests in the background may have switched Ctrl-C off
                signal.signal(signal.SIGINT, signal.default_int_handler)
                if before is not None:
                    before()
                code = _main(arguments)
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def says(self, text: str, *, timeout: float = 60) -> None:
        """Wait until `text` stands on the child's stderr."""
        limit = time.monotonic() + timeout
        while not (self._err.exists() and text in self._err.read_text()):
            if time.monotonic() > limit:
                raise TimeoutError(f"the child never said {text!r}: {self._err.read_text()}")
            time.sleep(0.002)

    def stops(self) -> None:
        """Wait until the child has stopped itself with SIGSTOP."""
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), self._err.read_text()

    def wait(self) -> Ran:
        """The end of the child; a signal that killed it is a negative exit code."""
        _, status = os.waitpid(self.pid, 0)
        return Ran(os.waitstatus_to_exitcode(status), self._out.read_text(), self._err.read_text())


class Steps:
    """What a run does to the files below `folder`, counted; just before step `at`, from 0, `act` is called.

    `install` in the child of a `Forked`. A step is a sync, a rename, a removal or a copied file.
    """

    def __init__(self, folder: Path, at: int | None = None, act: Callable[[], Any] | None = None) -> None:
        self._folder, self._at, self.seen = str(folder), at, 0
        self._act = act or (lambda: os.kill(os.getpid(), signal.SIGKILL))

    def install(self) -> None:
        for owner, name in ((os, "fsync"), (os, "rename"), (os, "unlink"), (shutil, "copyfile")):
            setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            # a sync names no file, but only a run's own files are synced
            if function.__name__ == "fsync" or any(str(one).startswith(self._folder) for one in args):
                number, self.seen = self.seen, self.seen + 1
                if number == self._at:
                    self._act()
            return function(*args, **kwargs)

        return counted


def count_steps(*arguments: object, folder: Path) -> int:
    """How many steps below `folder` `llmprune ARGUMENTS` takes when nothing disturbs it."""
    steps = Steps(folder)
    note = folder / "log-steps"

    def before() -> None:
        steps.install()
        end = os._exit

        def note_and_end(code: int) -> None:
            note.write_text(str(steps.seen))
            end(code)

        os._exit = note_and_end  # type: ignore[assignment]

    ran = Forked(*arguments, log=folder / "log", before=before).wait()
    assert ran.code == 0, ran.err
    return int(note.read_text())


def tree(folder: Path) -> dict[str, str]:
    """Everything below `folder`: names, and hashes of the contents."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def product(folder: Path) -> dict[str, str]:
    """What counts as the bytes of a result: every file but the report, which holds timings."""
    return {name: digest for name, digest in tree(folder).items() if name != "llmprune.json"}


def _main(arguments: Sequence[object]) -> int:
    """The exit code of the program, with a traceback printed for what escapes it, as Python does."""
    with _as_program(["llmprune", *map(str, arguments)]):
        try:
            program.main()
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:  # noqa: BLE001 (whatever escapes is what a test wants to see)
            traceback.print_exc()
            return 1
    return 0


@contextlib.contextmanager
def _as_program(argv: list[str]) -> Iterator[None]:
    before, hook = sys.argv, sys.unraisablehook
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)}
    sys.argv = argv
    try:
        yield
    finally:
        sys.argv, sys.unraisablehook = before, hook
        for number, handler in handlers.items():
            signal.signal(number, handler)
