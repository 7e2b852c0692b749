"""Shows how far an evaluation is while it runs: a bar on a terminal, plain lines elsewhere.

Who evaluates writes where it stands into `progress.json` in the run folder; the driver reads it in a thread, so it does
not matter where that is.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lmray.artifacts.files import write_json
from lmray.units import human_seconds

FILE = "progress.json"
POLL_S = 0.5
MIN_INTERVAL_S = 0.5
"""Shortest time between two writes."""
MIN_LINE_INTERVAL_S = 2.0
"""Shortest time between two plain lines of one kind."""


@dataclass(frozen=True)
class Standing:
    """Where an evaluation stands."""

    target: str
    doing: str
    """`loss`, `answers`, `choices` or `benchmarks`."""
    done: int
    total: int

    def line(self, elapsed_s: float) -> str:
        """Everything in one line."""
        return f"{self.target}: {self.doing} {self.done}/{self.total}  {human_seconds(elapsed_s)} gone"


class ProgressFile:
    """Written by who evaluates."""

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.monotonic):
        self.path, self._clock, self._due = folder / FILE, clock, float("-inf")

    def tell(self, standing: Standing) -> None:
        """Records `standing`, now and then; always when all is done."""
        now = self._clock()
        if now < self._due and standing.done < standing.total:
            return
        write_json(self.path, asdict(standing))
        self._due = now + MIN_INTERVAL_S


class Display(Protocol):
    """What `follow` draws on."""

    def show(self, standing: Standing) -> None:
        """Called whenever `standing` changed."""
        ...

    def close(self) -> None:
        """It is over."""
        ...


class Lines:
    """Plain lines: the first and the last of each thing done, between them one now and then."""

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic):
        self._stream, self._clock = stream, clock
        self._began, self._due, self._doing = clock(), 0.0, ("", "")

    def show(self, standing: Standing) -> None:
        now, doing = self._clock(), (standing.target, standing.doing)
        if doing == self._doing and now < self._due and standing.done < standing.total:
            return
        print(standing.line(now - self._began), file=self._stream, flush=True)
        self._doing, self._due = doing, now + max(MIN_LINE_INTERVAL_S, (now - self._began) / 20)

    def close(self) -> None:
        pass


class Bar:
    """A bar for each thing done on each target; they stay after the end."""

    def __init__(self, stream: TextIO):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=Console(file=stream))
        self._tasks: dict[str, TaskID] = {}

    def show(self, standing: Standing) -> None:
        self._progress.start()
        name = f"{standing.target}: {standing.doing}"
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=standing.total)
        self._progress.update(self._tasks[name], completed=standing.done, total=standing.total)

    def close(self) -> None:
        self._progress.stop()


@contextmanager
def follow(folder: Path, *, stream: TextIO | None = None) -> Iterator[None]:
    """Shows the progress of the evaluation in `folder` on `stream` (stderr) for the length of the block. Begin it
    before the evaluation: what an earlier one left is removed."""
    target: TextIO = stream or sys.stderr
    display: Display = Bar(target) if target.isatty() else Lines(target)
    (folder / FILE).unlink(missing_ok=True)
    over = threading.Event()
    thread = threading.Thread(target=_draw, args=(folder / FILE, display, over), name="lmray-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _draw(path: Path, display: Display, over: threading.Event) -> None:
    shown, last = None, False
    while not last:
        last = over.wait(POLL_S)  # so that the final look comes after the last write
        standing = _read(path)
        if standing is not None and standing != shown:
            display.show(standing)
            shown = standing
    display.close()


def _read(path: Path) -> Standing | None:
    try:
        return Standing(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
