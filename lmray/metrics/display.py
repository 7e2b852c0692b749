"""How far something is, on stderr while it runs: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lmray.metrics.looking import looking
from lmray.units import human_seconds

POLL_S = 0.5
MIN_LINE_INTERVAL_S = 2.0
"""Shortest time between two plain lines on one thing."""
LINE_SHARE = 0.05
"""The interval grows to so much of the time gone, so that long work prints few lines."""


@dataclass(frozen=True)
class Standing:
    """Where something stands."""

    what: str
    """What is counted; another one is another bar."""
    done: int
    total: int | None
    """None while it is not known."""
    facts: str = ""
    """What else there is to say."""
    left_s: float | None = None
    """Seconds to the end, where there is telling."""

    @property
    def left(self) -> str:
        """`left_s` in words."""
        return "" if self.left_s is None else f"{human_seconds(self.left_s)} left"

    def line(self, elapsed_s: float) -> str:
        """Everything in one line."""
        times = ", ".join(filter(None, (f"{human_seconds(elapsed_s)} gone", self.left)))
        return "  ".join(filter(None, (f"{self.what} {self.done:,}/{_number(self.total)}", self.facts, times)))


def _number(total: int | None) -> str:
    return "?" if total is None else f"{total:,}"


class Display(Protocol):
    """What a standing is shown on."""

    def show(self, standing: Standing) -> None:
        """Called as often as one likes."""
        ...

    def close(self) -> None:
        """It is over."""
        ...


class Lines:
    """Plain lines: the first and the last of each thing always, between them one now and then."""

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic):
        self._stream, self._clock = stream, clock
        self._began, self._due = clock(), 0.0
        self._printed: Standing | None = None
        self._latest: Standing | None = None

    def show(self, standing: Standing) -> None:
        self._latest, printed = standing, self._printed
        begins = printed is None or printed.what != standing.what
        if begins or self._clock() >= self._due or standing.done == standing.total:
            self._print(standing)

    def close(self) -> None:
        if self._latest is not None:
            self._print(self._latest)

    def _print(self, standing: Standing) -> None:
        before = self._printed
        if before is not None and (before.what, before.done) == (standing.what, standing.done):
            return
        now = self._clock()
        print(standing.line(now - self._began), file=self._stream, flush=True)
        self._printed, self._due = standing, now + max(MIN_LINE_INTERVAL_S, (now - self._began) * LINE_SHARE)


class Bar:
    """A bar for each thing; they stay after the end."""

    def __init__(self, stream: TextIO):
        left, facts = TextColumn("{task.fields[left]}"), TextColumn("{task.fields[facts]}")
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            left,
            facts,
        )
        self._progress = Progress(*columns, console=Console(file=stream))
        self._tasks: dict[str, TaskID] = {}

    def show(self, standing: Standing) -> None:
        self._progress.start()
        if standing.what not in self._tasks:
            self._tasks[standing.what] = self._progress.add_task(
                standing.what, total=standing.total, left=standing.left, facts=standing.facts
            )
        task = self._tasks[standing.what]
        self._progress.update(
            task, completed=standing.done, total=standing.total, left=standing.left, facts=standing.facts
        )

    def close(self) -> None:
        self._progress.stop()


def make_display(stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic) -> Display:
    """The display that suits `stream` (stderr)."""
    target: TextIO = stream or sys.stderr
    return Bar(target) if target.isatty() else Lines(target, clock=clock)


@contextmanager
def followed(look: Callable[[], Standing | None], *, stream: TextIO | None = None) -> Iterator[None]:
    """Shows what `look` gives, now and then, for the length of the block; a thread asks it, also once at the end.
    None shows nothing."""
    with closing(make_display(stream)) as display:

        def draw() -> None:
            if (standing := look()) is not None:
                display.show(standing)

        with looking(draw, every_s=POLL_S, name="lmray-progress"):
            yield
