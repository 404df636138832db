"""Ctrl-C and SIGTERM end a run with an exception, wherever it stands."""

from __future__ import annotations

import signal
import sys
from typing import Any, NoReturn

AGAIN_SECONDS = 0.01


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM. Not KeyboardInterrupt: typer would end the program on that, with no word on resuming."""


_interrupted = False


def listen() -> None:
    """From now on, raise `Interrupted` in this process where SIGTERM, or an interrupt of the user, reaches it."""
    global _interrupted
    _interrupted = False
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGALRM, _interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    sys.unraisablehook = _unraisable


def check() -> None:
    """Raise `Interrupted` if it was raised before, and something swallowed it.

    To be called before a result is entered as good: what was computed meanwhile may lack what the exception cut short.
    """
    if _interrupted:
        raise Interrupted


def _interrupt(number: int, frame: object) -> NoReturn:
    global _interrupted
    _interrupted = True
    raise Interrupted


def _unraisable(unraisable: Any) -> None:
    """Python drops what is raised in a finalizer or while a weak reference dies: an interrupt comes again."""
    if unraisable.exc_type is Interrupted:
        signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)
    else:
        sys.__unraisablehook__(unraisable)
