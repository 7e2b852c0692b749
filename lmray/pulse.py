"""Whether this process makes progress, and at what: told by the code that does the work, read by what looks for hangs.

A process is one rank of one run, so there is one pulse a process: `PULSE`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock


class Pulse:
    """Signs of life. Any thread may give them."""

    def __init__(self):
        self.beats = 0
        """Grows with every sign of life."""
        self.step = 0
        """The optimizer step that is being taken."""
        self.doing = "starting"
        self._waits, self._lock = 0, Lock()

    def beat(self, doing: str, *, step: int | None = None) -> None:
        """This process begins with `doing`, of the same optimizer step unless `step` names another."""
        self.step = self.step if step is None else step
        self.doing = doing
        self.beats += 1

    @property
    def waits(self) -> bool:
        """Whether silence means nothing now."""
        return self._waits > 0

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """For the length of the block silence means nothing: `what` takes as long as it takes, or has a limit of its
        own."""
        self.beat(what)
        with self._lock:
            self._waits += 1
        try:
            yield
        finally:
            with self._lock:
                self._waits -= 1
            self.beat(f"after {what}")


PULSE = Pulse()
