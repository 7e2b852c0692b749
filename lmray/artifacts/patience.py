"""Patience with a store that is full or away: a write is tried again with growing pauses, for a bounded time."""

from __future__ import annotations

import errno
import os
import re
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from lmray.errors import CheckpointError
from lmray.pulse import PULSE
from lmray.units import human_seconds

T = TypeVar("T")

TOTAL_S = 600.0
"""How long one write is tried, all its pauses together."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
PASSING = frozenset(
    getattr(errno, name)
    for name in (
        *("ENOSPC", "EDQUOT", "EIO", "ENOENT", "ESTALE", "EACCES", "EPERM", "EROFS", "EBUSY", "EAGAIN", "ENOLCK"),
        *("ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH", "ENOTCONN", "ECONNRESET", "ENODEV", "ENXIO", "EREMOTEIO"),
    )
    if hasattr(errno, name)
)
"""What a full disk, a mount that went away or a file server that restarts answers; all of it may pass."""


def say_on_stderr(text: str) -> None:
    """One line for people."""
    print(text, file=sys.stderr, flush=True)


class Patience:
    """Does writes, and does them again while the store is full or away.

    `say` hears of it once when waiting begins and once when the write is done; `clock` and `sleep` are for tests.
    """

    def __init__(
        self,
        *,
        say: Callable[[str], None] = say_on_stderr,
        total_s: float = TOTAL_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.say, self.total_s, self._clock, self._sleep = say, total_s, clock, sleep

    def __call__(self, what: str, write: Callable[[], T], *, hint: str) -> T:
        """What `write` gives; `what` says what it does ("writing FILE"). It must be fit to be done again after it
        failed half-way. Raises CheckpointError with `hint` once the time is over; an error that no waiting mends
        passes as it is."""
        began, pause = None, FIRST_PAUSE_S
        while True:
            try:
                result = write()
            except Exception as error:
                trouble = passing(error)
                if trouble is None:
                    raise
            else:
                if began is not None:
                    self.say(f"{what}: done, the run goes on")
                return result
            if began is None:
                began = self._clock()
                self.say(f"{what} failed: {trouble}; trying again for up to {human_seconds(self.total_s)}")
            left = began + self.total_s - self._clock()
            if left <= 0:
                raise CheckpointError(what, f"failed for {human_seconds(self.total_s)}: {trouble}", hint=hint)
            with PULSE.waiting(f"{what} again"):
                self._sleep(min(pause, left))
            pause = min(pause * 2, LONGEST_PAUSE_S)


def passing(error: Exception) -> str | None:
    """What is wrong with the store, in words, where `error` is of a kind that may pass; else None."""
    if isinstance(error, OSError) and error.errno is None and error.args and isinstance(error.args[0], list):
        return str(error.args[0][-1][-1])  # shutil.Error: (source, target, reason) of each file of a tree
    number = error.errno if isinstance(error, OSError) else _number_in(str(error))
    if number not in PASSING or number is None:
        return None
    place = getattr(error, "filename", None)
    return os.strerror(number) + (f" ({place})" if place else "")


def _number_in(text: str) -> int | None:
    """Libraries in Rust (safetensors, tokenizers) raise errors of their own, with the number in their text."""
    found = re.search(r"\(os error (\d+)\)|\bcode: (\d+), kind: ", text)
    return int(found.group(1) or found.group(2)) if found else None
