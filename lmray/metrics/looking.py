"""Looking at something now and then while other work is done."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def looking(look: Callable[[], None], *, every_s: float, name: str, wait_s: float | None = None) -> Iterator[None]:
    """Calls `look` every so many seconds for the length of the block, in a thread called `name`, and once more after
    it, so that nothing of the block is missed. `wait_s`: how long the last look is waited for. Empty: to its end."""
    over = threading.Event()

    def work() -> None:
        last = False
        while not last:
            last = over.wait(every_s)
            look()

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(wait_s)
