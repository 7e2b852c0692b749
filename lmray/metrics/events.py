"""`events.jsonl`: one line a report, flushed at once; after a resume it holds the committed lineage only."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmray.artifacts.files import write_atomic


class EventLog:
    """Appends reports of one run to a file that a progress bar, a plot or `tail -f` reads while it grows."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()  # a checkpoint is committed beside the steps that follow
        self._waiting: list[str] = []
        self._whole: int | None = None
        """Length of the file before a write that failed: what is beyond is written again."""

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """`add` and `flush`."""
        self.add(step, metrics)
        self.flush()

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes a report in; the next `flush` writes it."""
        line = json.dumps({"step": step, "time": round(time.time(), 3), **metrics}, ensure_ascii=False)
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

    def truncate_after(self, step: int) -> None:
        """Drops lines of steps beyond `step`: what a killed process reported but never committed."""
        kept = [json.dumps(event, ensure_ascii=False) + "\n" for event in self.read() if event["step"] <= step]
        write_atomic(self.path, "".join(kept))


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
