"""`events.jsonl`: one line a report, flushed at once; after a resume it holds the committed lineage only.

`attempts.json` beside it says where each attempt of the run went on, and so remembers what is dropped from the log.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lmray.artifacts.files import write_atomic, write_json

ATTEMPTS = "attempts.json"
FACTS = ("step", "time", "attempt", "world_size", "replayed")
"""What an event may say beside its metrics; `replayed`: an earlier attempt had reported this step already."""


@dataclass(frozen=True)
class Attempt:
    """One group of processes at work on a run."""

    attempt: int
    """1 for the first."""
    after_step: int
    """The step whose checkpoint it went on from; 0 for none."""
    world_size: int
    reported: int
    """The last step that an attempt before it had reported, committed or not."""


class EventLog:
    """Appends reports of one attempt of a run to a file that a progress bar, a plot or `tail -f` reads while it
    grows."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()  # a checkpoint is committed beside the steps that follow
        self.attempt = Attempt(1, 0, 1, 0)
        self._attempts: list[Attempt] | None = None
        self._waiting: list[str] = []
        self._whole: int | None = None
        """Length of the file before a write that failed: what is beyond is written again."""

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """`add` and `flush`."""
        self.add(step, metrics)
        self.flush()

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes a report in; the next `flush` writes it."""
        one = self.attempt
        facts = {"step": step, "time": round(time.time(), 3), "attempt": one.attempt, "world_size": one.world_size}
        facts |= {"replayed": True} if step <= one.reported else {}
        line = json.dumps({**facts, **metrics}, ensure_ascii=False)
        with self._lock:
            self._waiting.append(line + "\n")

    def flush(self, *, durable: bool = False) -> None:
        """Writes what waits, `durable`: to the disk itself. Raises OSError where it cannot; then all of it waits on,
        and a later call leaves each line once."""
        with self._lock:
            with open(self.path, "ab+") as file:
                if self._whole is not None:
                    file.truncate(self._whole)
                start = file.seek(0, os.SEEK_END)
                cut_off = start and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"  # by a kill
                self._whole = start
                file.write((("\n" if cut_off else "") + "".join(self._waiting)).encode())
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            self._waiting, self._whole = [], None

    def read(self) -> list[dict[str, Any]]:
        """All complete lines."""
        return read_events(self.path)

    def begin_attempt(self, after_step: int, *, world_size: int) -> None:
        """The run goes on after `after_step`: drops lines of steps beyond it, which a killed process reported but never
        committed, and remembers that they were. To be called once; done again after an OSError, it gives the same."""
        events = self.read()
        if self._attempts is None:
            before = read_attempts(self.path.parent)
            numbers = [*(one.attempt for one in before), *(event.get("attempt", 1) for event in events)]
            reported = max([*(one.reported for one in before), *(event["step"] for event in events)], default=0)
            self.attempt = Attempt(max(numbers, default=0) + 1, after_step, world_size, reported)
            self._attempts = [*before, self.attempt]
        write_json(self.path.parent / ATTEMPTS, [asdict(one) for one in self._attempts])  # before anything is dropped
        kept = [json.dumps(event, ensure_ascii=False) + "\n" for event in events if event["step"] <= after_step]
        write_atomic(self.path, "".join(kept))


def read_attempts(folder: Path) -> list[Attempt]:
    """The attempts of the run in `folder`, in order."""
    path = folder / ATTEMPTS
    return [Attempt(**one) for one in json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else []


def read_events(path: Path) -> list[dict[str, Any]]:
    """All complete lines of an event log; a last line cut off by a kill is left out."""
    if not path.is_file():
        return []
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def metrics_of(event: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of one event."""
    return {name: value for name, value in event.items() if name not in FACTS}
