"""Waiting for something another process does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

POLL_S = 0.02


def wait_until(condition: Callable[[], object], what: str, *, timeout_s: float = 300.0) -> None:
    """Returns as soon as `condition()` is true. Raises TimeoutError saying `what` did not happen."""
    tick, deadline = threading.Event(), time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:.0f} s in vain for: {what}")
        tick.wait(POLL_S)
