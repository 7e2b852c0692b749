"""How far a loop over many things is, on stderr, once it takes more than a moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

from lmray.metrics.display import Standing, make_display

DELAY_S = 3.0
"""A loop that ends sooner shows nothing."""


class Counter:
    """A display for the length of a block. `total` is None where it is not known."""

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
        self._began, self._display = clock(), make_display(stream, clock=clock)

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *error: object) -> None:
        self._display.close()

    def at(self, done: int) -> None:
        """`done` of the total are done; called as often as one likes."""
        elapsed = self.clock() - self._began
        if elapsed >= DELAY_S:
            left_s = (self.total - done) * elapsed / done if done and self.total is not None else None
            facts = f"{done / elapsed:,.0f} {self.unit} a second"
            self._display.show(Standing(self.what, done, self.total, facts, left_s))
