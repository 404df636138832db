"""Telling a person how far a run is: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from llmprune.memory import current
from llmprune.types import Outcome

# The longest that a method which goes over the layers in ways of its own is silent, in seconds.
SILENCE = 15.0


class Reporter:
    """Receives what happens in a run; writes to stderr, so that stdout stays free for results."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._live = self._console.is_terminal and not quiet
        self._bar: Progress | None = None
        self._started = self._spoke = time.monotonic()
        self._done = 0
        self._total = 0
        self._known = 0

    def say(self, text: str) -> None:
        """A line about the run as a whole."""
        self._console.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self._console.print(f"warning: {text}", markup=False, style="yellow", soft_wrap=True)

    def start(self, weights: int, known: int) -> None:
        """Work begins on `weights` weights, of which `known` were finished by an earlier run."""
        self._total, self._known, self._done = weights, known, known
        self._started = time.monotonic()
        if self._live:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("weights"),
                TimeElapsedColumn(),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=self._console,
            )
            self._task = self._bar.add_task("pruning", total=weights, completed=known)
            self._bar.start()

    def matrix(self, outcome: Outcome, seconds: float) -> None:
        """A matrix is solved."""
        self._done += outcome.shape[0] * outcome.shape[1]
        error = "" if outcome.error is None else f"  error {outcome.error:.2e}"
        line = f"{outcome.name}  {outcome.achieved / (outcome.shape[0] * outcome.shape[1]):.1%}{error}  {seconds:.2f} s"
        memory = f"{current()[0] / 2**20:.0f} MiB"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=f"{outcome.name}  {memory}")
            self._bar.console.print(line, markup=False)
        else:
            self.say(f"{line}  {memory}  {self._remaining()} left")

    def layer(self, index: int, count: int) -> None:
        """Layer `index` of `count` is worked on, perhaps not for the first time: said now and then."""
        now = time.monotonic()
        if now - self._spoke >= SILENCE:
            self.say(f"at layer {index} of 0 to {count - 1}, {_in_words(now - self._started)} so far")
            self._spoke = now

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _remaining(self) -> str:
        fresh = self._done - self._known
        seconds = (time.monotonic() - self._started) * (self._total - self._done) / max(fresh, 1)
        return _in_words(seconds)


def _in_words(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
