"""A process that dies at a chosen file operation, without ending this one.

Python's audit events tell of every file that is opened to write, renamed or removed, whoever does it. At the chosen one
the process "dies": that operation and all later ones fail, so nothing that cleans up on the way out can help.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from unittest.mock import patch

from lmray.artifacts import files

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
DEAD_PID = 2**22 + 1
"""Above the largest number a process can have."""


class Killed(BaseException):
    """What a kill is to the code that is running."""


class _Reaper:
    """Counts file operations below `root` and kills at the one it is told."""

    def __init__(self):
        self.root, self.at = "", 0
        self.seen: list[tuple[str, str]] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple) -> None:
        if not self.root or not self._changes(event, arguments):
            return
        path = next((str(one) for one in arguments if str(one).startswith(self.root)), None)
        if path is None:
            return
        self.seen.append((event, re.sub(r"-[0-9a-f]{8}\.tmp|[0-9a-f]{16,}|\d+", "N", path.removeprefix(self.root))))
        if self.at and len(self.seen) >= self.at:
            raise Killed(event, path)

    @staticmethod
    def _changes(event: str, arguments: tuple) -> bool:
        if event == "open":
            return isinstance(arguments[2], int) and bool(arguments[2] & WRITES)
        return event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link")


@cache
def _reaper() -> _Reaper:
    """One a process: an audit hook stays."""
    return _Reaper()


def file_operations(root: Path, run: Callable[[], object], *, kill_at: int = 0) -> list[tuple[str, str]]:
    """What `run` does to files below `root`: `(event, path)` of each operation, numbers in paths made alike.

    Raises Killed at operation `kill_at`, counted from one; temporary files then look as if their writer were gone.
    """
    reaper = _reaper()
    reaper.root, reaper.at, reaper.seen = str(root), kill_at, []
    writer = f"{files.platform.node()}-{DEAD_PID}" if kill_at else files._writer()
    try:
        with patch.object(files, "_writer", lambda: writer):
            run()
    finally:
        reaper.root = ""
    return reaper.seen
