"""Shows how far a training run is while it runs: a bar on a terminal, plain lines elsewhere.

Runs in the driver, in a thread that reads the run folder's `events.jsonl`, so who trains knows nothing of it.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lmray.units import human_seconds

POLL_S = 0.5
MIN_INTERVAL_S = 2.0
"""Shortest time between two plain lines."""
MAX_LINES = 100
"""About so many plain lines are printed in a long run: the interval grows with the time gone."""


class EventTail:
    """Gives the events that were added to a log since it was last asked, also when the log was rewritten meanwhile."""

    def __init__(self, path: Path):
        self.path, self._inode, self._offset = path, 0, 0

    def new(self) -> list[dict[str, Any]]:
        """Complete lines not given before."""
        try:
            with open(self.path, "rb") as file:
                facts = self.path.stat()
                if facts.st_ino != self._inode or facts.st_size < self._offset:
                    self._inode, self._offset = facts.st_ino, 0
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines() if line.startswith(b"{")]


@dataclass
class Standing:
    """Where a run stands, from its events."""

    total: int | None = None
    """Optimizer steps of the whole run; None until its plan is there."""
    step: int = 0
    latest: dict[str, float] = field(default_factory=dict)
    """The last value of each metric."""
    pace: list[tuple[int, float]] = field(default_factory=list)
    """Step and time of the first and of the last event seen in this attempt."""

    def add(self, events: list[dict[str, Any]]) -> None:
        """Takes in new events, in order."""
        for event in events:
            self.step = event["step"]
            self.latest |= {key: value for key, value in event.items() if key not in ("step", "time")}
            self.pace = [*self.pace[:1], (event["step"], event["time"])]

    def remaining_s(self) -> float | None:
        """Seconds to the last step at the pace so far, or None while there is no telling."""
        if self.total is None or len(self.pace) < 2 or self.pace[1][0] <= self.pace[0][0]:
            return None
        (first, began), (last, now) = self.pace
        return (self.total - last) * (now - began) / (last - first)

    def facts(self) -> str:
        """Loss, learning rate and speed in words."""
        words = (("train.loss", "loss {:.4f}"), ("eval.loss", "held out {:.4f}"), ("train.learning_rate", "lr {:.2e}"))
        shown = [text.format(self.latest[name]) for name, text in words if name in self.latest]
        if "train.tokens_per_s" in self.latest:
            shown.append(f"{self.latest['train.tokens_per_s']:,.0f} tokens/s")
        return "  ".join(shown)

    def line(self, elapsed_s: float) -> str:
        """Everything in one line."""
        left = self.remaining_s()
        times = [human_seconds(elapsed_s) + " gone", *([f"{human_seconds(left)} left"] if left is not None else [])]
        return f"step {self.step}/{self.total or '?'}  {self.facts()}  " + ", ".join(times)


class Display(Protocol):
    """What `follow` draws on."""

    def show(self, standing: Standing, *, last: bool) -> None:
        """Called after new events; `last`: it is over."""
        ...


class Lines:
    """Plain lines, the first and the last always, between them one now and then."""

    def __init__(self, stream: TextIO):
        self.stream, self._began, self._due, self._shown = stream, time.monotonic(), 0.0, -1

    def show(self, standing: Standing, *, last: bool) -> None:
        now = time.monotonic()
        if standing.step == self._shown or (now < self._due and not last):
            return
        elapsed = now - self._began
        print(standing.line(elapsed), file=self.stream, flush=True)
        self._shown, self._due = standing.step, now + max(MIN_INTERVAL_S, elapsed * 5 / MAX_LINES)


class Bar:
    """A bar that stays after the end."""

    def __init__(self, stream: TextIO):
        left, facts = TextColumn("{task.fields[left]}"), TextColumn("{task.description}")
        columns = (TextColumn("step"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), left, facts)
        self._progress = Progress(*columns, console=Console(file=stream))
        self._task: TaskID | None = None

    def show(self, standing: Standing, *, last: bool) -> None:
        remaining = standing.remaining_s()
        left = f"{human_seconds(remaining)} left" if remaining else ""
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task(standing.facts(), total=standing.total, left=left)
        facts = standing.facts()
        self._progress.update(self._task, total=standing.total, completed=standing.step, description=facts, left=left)
        if last:
            self._progress.stop()


@contextmanager
def follow(folder: Path, *, stream: TextIO | None = None) -> Iterator[None]:
    """Shows the progress of the run in `folder` on `stream` (stderr) for the length of the block."""
    target: TextIO = stream or sys.stderr
    display: Display = Bar(target) if target.isatty() else Lines(target)
    over, tail = threading.Event(), EventTail(folder / "events.jsonl")
    thread = threading.Thread(target=_draw, args=(folder, tail, display, over), name="lmray-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _draw(folder: Path, tail: EventTail, display: Display, over: threading.Event) -> None:
    standing, last = Standing(), False
    while not last:
        last = over.wait(POLL_S)  # so that the final look comes after the last event
        events = tail.new()
        if events and standing.total is None:
            standing.total = _total(folder)
        standing.add(events)
        if standing.step and (events or last):
            display.show(standing, last=last)


def _total(folder: Path) -> int | None:
    try:
        return json.loads((folder / "plan.json").read_text(encoding="utf-8"))["steps"]
    except (OSError, ValueError):
        return None
