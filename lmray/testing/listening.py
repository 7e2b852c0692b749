"""A real server on loopback for clients that are not ours, and ports that are free."""

from __future__ import annotations

import random
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn

STARTS_S = 120.0
PORTS = range(20500, 30000)
"""Above those that Ray gives its workers, below those that the system gives to whoever asks for any."""
NUM_TRIES = 100


def free_port() -> int:
    """One that nobody else is given meanwhile."""
    with socket.socket() as probe:
        for port in random.SystemRandom().sample(PORTS, NUM_TRIES):
            with suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
    raise OSError(f"none of {NUM_TRIES} ports is free")


def is_cut(connection: socket.socket, *, timeout_s: float = 60.0) -> bool:
    """Whether `connection`, from which nothing is read meanwhile, is reset by the other side."""
    watch = select.poll()
    watch.register(connection, 0)  # resets are told in any case
    return bool(watch.poll(timeout_s * 1000))


class _Server(uvicorn.Server):
    """Says when it listens."""

    def __init__(self, app: Any, loop: Any):
        # Without a configuration of its own for logging, which would close the handlers of others and their streams.
        told: Any = {"log_config": None, "log_level": "error", "timeout_graceful_shutdown": 5}
        super().__init__(uvicorn.Config(app, loop=loop, **told))
        self.listens = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listens.set()


@contextmanager
def listening(app: Any, *, path: str = "", loop: str = "auto") -> Iterator[str]:
    """The address of `app` while it is served on uvicorn's `loop`, with `path` behind it. Raises TimeoutError where it
    does not start."""
    server = _Server(app, loop)
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=([place],), daemon=True)
        thread.start()
        if not server.listens.wait(STARTS_S):
            raise TimeoutError(f"the server does not listen after {STARTS_S:.0f} s")
        try:
            yield f"http://127.0.0.1:{place.getsockname()[1]}{path}"
        finally:
            server.should_exit = True
            thread.join(60)
