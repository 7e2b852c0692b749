"""Shows how far a training run is while it runs, in the driver.

A thread reads the run folder's `events.jsonl`, so who trains knows nothing of it.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from lmray.metrics.display import Standing, followed
from lmray.metrics.events import metrics_of


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
        except OSError:  # not there yet, or the store is away for a while
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [event for line in whole.splitlines() if (event := _event(line)) is not None]


def _event(line: bytes) -> dict[str, Any] | None:
    """None for a line that a kill cut off, behind which the log went on."""
    try:
        return json.loads(line)
    except ValueError:
        return None


@dataclass
class Steps:
    """A run's steps, from its events."""

    total: int | None = None
    """Optimizer steps of the whole run; None until its plan is there."""
    step: int = 0
    latest: dict[str, float] = field(default_factory=dict)
    """The last value of each metric."""
    pace: list[tuple[int, float]] = field(default_factory=list)
    """Step and time of the first and of the last event of this attempt."""
    attempt: int | None = None

    def add(self, events: list[dict[str, Any]]) -> None:
        """Takes in new events, in order."""
        for event in events:
            self.step = event["step"]
            self.latest |= metrics_of(event)
            first = self.pace[:1] if event.get("attempt") == self.attempt else []
            self.attempt, self.pace = event.get("attempt"), [*first, (event["step"], event["time"])]

    def standing(self) -> Standing | None:
        """None before the first step."""
        return Standing("step", self.step, self.total, self._facts(), self._left_s()) if self.step else None

    def _left_s(self) -> float | None:
        """Seconds to the last step at the pace so far, or None while there is no telling."""
        if self.total is None or len(self.pace) < 2 or self.pace[1][0] <= self.pace[0][0]:
            return None
        (first, began), (last, now) = self.pace
        return (self.total - last) * (now - began) / (last - first)

    def _facts(self) -> str:
        """Loss, learning rate and speed in words."""
        words = (("train.loss", "loss {:.4f}"), ("eval.loss", "held out {:.4f}"), ("train.learning_rate", "lr {:.2e}"))
        shown = [text.format(self.latest[name]) for name, text in words if name in self.latest]
        if "train.tokens_per_s" in self.latest:
            shown.append(f"{self.latest['train.tokens_per_s']:,.0f} tokens/s")
        return "  ".join(shown)


def follow(folder: Path, *, stream: TextIO | None = None) -> AbstractContextManager[None]:
    """Shows the progress of the run in `folder` on `stream` (stderr) for the length of the block."""
    tail, steps = EventTail(folder / "events.jsonl"), Steps()

    def look() -> Standing | None:
        steps.add(tail.new())
        if steps.total is None:
            steps.total = _total(folder)
        return steps.standing()

    return followed(look, stream=stream)


def _total(folder: Path) -> int | None:
    try:
        return json.loads((folder / "plan.json").read_text(encoding="utf-8"))["steps"]
    except (OSError, ValueError):
        return None
