"""How far a loop over many things is, on stderr, once it takes more than a moment."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from lmray.units import human_seconds

DELAY_S = 3.0
"""A loop that ends sooner shows nothing."""
SHARE = 0.2
"""A line is printed after so much more of the time gone, so that long loops print few."""


class Counter:
    """Plain lines; on a terminal, one line that is written over. `total` is None where it is not known."""

    def __init__(
        self,
        what: str,
        total: int | None,
        *,
        unit: str,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.what, self.total, self.unit, self.clock = what, total, unit, clock
        self.stream: TextIO = stream or sys.stderr
        self._began = clock()
        self._due = self._began + DELAY_S

    def at(self, done: int, *, last: bool = False) -> None:
        """`done` of the total are done; called as often as one likes. `last`: there are no more, where the total is
        not known (None)."""
        now = self.clock()
        shown, last = self._due > self._began + DELAY_S, last or (self.total is not None and done >= self.total)
        if now < self._due and not (shown and last):
            return
        elapsed = now - self._began
        terminal = self.stream.isatty()
        end = "\n" if last or not terminal else ""
        print(("\r" if terminal else "") + self._line(done, elapsed), end=end, file=self.stream, flush=True)
        self._due = now + (0.2 if terminal else max(DELAY_S, elapsed * SHARE))

    def _line(self, done: int, elapsed: float) -> str:
        speed = done / elapsed
        if self.total is None:
            return f"{self.what} {done:,} {self.unit}  {speed:,.0f} a second  {human_seconds(elapsed)} gone"
        left = human_seconds((self.total - done) / speed) if done else "?"
        facts = f"{done:,}/{self.total:,} {self.unit}  {speed:,.0f} a second"
        return f"{self.what} {facts}  {human_seconds(elapsed)} gone, {left} left"
