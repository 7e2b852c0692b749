"""Shows how far an evaluation is while it runs.

Who evaluates writes where it stands into `progress.json` in the run folder; the driver reads it in a thread, so it does
not matter where that is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from lmray.artifacts.files import write_json
from lmray.metrics.display import Standing, followed

FILE = "progress.json"
MIN_INTERVAL_S = 0.5
"""Shortest time between two writes."""


class ProgressFile:
    """Written by who evaluates."""

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.monotonic):
        self.path, self._clock, self._due = folder / FILE, clock, float("-inf")

    def tell(self, standing: Standing) -> None:
        """Records `standing`, now and then; always when all is done."""
        now = self._clock()
        if now < self._due and standing.done != standing.total:
            return
        write_json(self.path, asdict(standing))
        self._due = now + MIN_INTERVAL_S


def follow(folder: Path, *, stream: TextIO | None = None) -> AbstractContextManager[None]:
    """Shows the progress of the evaluation in `folder` on `stream` (stderr) for the length of the block. Ask for it
    before the evaluation: what an earlier one left is removed."""
    path = folder / FILE
    path.unlink(missing_ok=True)
    return followed(lambda: _read(path), stream=stream)


def _read(path: Path) -> Standing | None:
    try:
        return Standing(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
