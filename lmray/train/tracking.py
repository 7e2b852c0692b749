"""Keeps trackers told of a run, from its event log and in threads of their own: whatever becomes of a tracker, the
training goes on. Runs on rank 0.

How far a tracker was told is kept in `trackers/NAME.json` of the run folder, written after the tracker was told. A
resumed run goes through some steps again; the tracker is told of each once.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmray.artifacts.files import write_json
from lmray.context import Result
from lmray.metrics.events import metrics_of, read_events
from lmray.metrics.progress import EventTail
from lmray.trackers.base import Session, TrackedRun, Tracker

POLL_S = 1.0
END_S = 30.0
"""How long the end of a run waits for a tracker that is behind."""


class Tracking:
    """The trackers of one run, for the length of a `with` block."""

    def __init__(self, trackers: Sequence[Tracker], run: TrackedRun):
        self.result: Result | None = None
        """Set before the block ends, where the run came to a result."""
        self._followers = [_Follower(tracker, run) for tracker in trackers]

    def __enter__(self) -> Tracking:
        for follower in self._followers:
            follower.start()
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        status = self.result.status if self.result and not kind else "failed"
        metrics = self.result.metrics if self.result else {}
        for follower in self._followers:
            follower.end(status, metrics)
        for follower in self._followers:
            follower.wait()


@dataclass
class _Told:
    """How far a tracker was told, on disk."""

    path: Path
    session_id: str | None = None
    step: int = 0
    ended: bool = False
    """Also of the run's end."""

    @classmethod
    def load(cls, path: Path) -> _Told:
        if not path.is_file():
            return cls(path)
        facts = json.loads(path.read_text(encoding="utf-8"))
        return cls(path, facts["id"], facts["step"], facts["ended"])

    def save(self) -> None:
        write_json(self.path, {"id": self.session_id, "step": self.step, "ended": self.ended})


class _Follower:
    """One tracker's thread."""

    def __init__(self, tracker: Tracker, run: TrackedRun):
        self.tracker, self.run = tracker, run
        self._over, self._status, self._final = threading.Event(), "failed", {}
        self._thread = threading.Thread(target=self._work, name=f"lmray-{tracker.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self, status: str, metrics: Mapping[str, float]) -> None:
        """Lets the thread end once it has told everything."""
        self._status, self._final = status, dict(metrics)
        self._over.set()

    def wait(self) -> None:
        self._thread.join(END_S)
        if self._thread.is_alive():
            self._warn(f"has not answered for {END_S:.0f} s; the run ends without it")

    def _work(self) -> None:
        try:
            self._follow()
        except Exception as error:  # a tracker's library raises anything, and none of it may reach the training
            self._warn(f"failed, the run goes on without it: {type(error).__name__}: {error}")

    def _follow(self) -> None:
        told = _Told.load(self.run.folder / "trackers" / f"{self.tracker.name}.json")
        if told.ended:
            return
        session = self.tracker.open(self.run, session_id=told.session_id, after=told.step)
        told.session_id, told.step = session.id, max(told.step, session.last_step)
        told.save()
        tail, over = EventTail(self.run.folder / "events.jsonl"), False
        while not over:
            over = self._over.wait(POLL_S)  # so that the last look comes after the last event
            self._tell(session, told, tail.new())
        if self._status == "succeeded":
            in_events = {name for event in read_events(tail.path) for name in event}
            final = {name: value for name, value in self._final.items() if name not in in_events}
            session.log(told.step, time.time(), final)
        session.finish(self._status)
        told.ended = self._status == "succeeded"
        told.save()

    def _tell(self, session: Session, told: _Told, events: Sequence[Mapping[str, Any]]) -> None:
        new = [event for event in events if event["step"] > told.step]
        for event in new:
            session.log(event["step"], event["time"], metrics_of(event))
            told.step = event["step"]
        if new:
            session.flush()
            told.save()

    def _warn(self, text: str) -> None:
        print(f"tracker `{self.tracker.name}` {text}", file=sys.stderr, flush=True)
