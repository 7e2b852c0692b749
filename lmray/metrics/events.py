"""`events.jsonl`: one line a report, flushed at once; after a resume it holds the committed lineage only."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmray.artifacts.files import write_atomic


class EventLog:
    """Appends reports of one run to a file that a progress bar, a plot or `tail -f` reads while it grows."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        line = json.dumps({"step": step, "time": round(time.time(), 3), **metrics}, ensure_ascii=False)
        with open(self.path, "ab+") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                line = "\n" + line  # after a line that a kill cut off
            file.write(line.encode() + b"\n")

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
