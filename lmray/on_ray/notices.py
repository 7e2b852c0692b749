"""What a worker says to the people at the driver: lines through the cluster's own key-value store, which is there when
the run's store is not. Workers' own stderr stays in Ray's logs."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_list, _internal_kv_put

from lmray.artifacts.patience import say_on_stderr
from lmray.metrics.looking import looking

POLL_S = 1.0
NAMESPACE = b"lmray"


def _prefix(folder: Path) -> str:
    return f"notice:{folder}:"


def say_to_driver(folder: Path, text: str) -> None:
    """Says `text` of the run in `folder`: here, into the worker's log, and at the driver."""
    say_on_stderr(text)
    key = f"{_prefix(folder)}{time.time():017.6f}-{secrets.token_hex(4)}"
    _internal_kv_put(key.encode(), text.encode(), namespace=NAMESPACE)


def notices(folder: Path) -> list[str]:
    """What was said of the run in `folder` since the last call, in order."""
    said = []
    for key in sorted(_internal_kv_list(_prefix(folder).encode(), namespace=NAMESPACE)):
        said.append((_internal_kv_get(key, namespace=NAMESPACE) or b"").decode())
        _internal_kv_del(key, namespace=NAMESPACE)
    return said


@contextmanager
def heard(folder: Path) -> Iterator[None]:
    """Prints on stderr what workers say of the run in `folder`, for the length of the block."""

    def listen() -> None:
        with suppress(Exception):  # the cluster is gone; the fit itself says so
            for text in notices(folder):
                say_on_stderr(text)

    # A cluster that is gone may keep the last look waiting.
    with looking(listen, every_s=POLL_S, name="lmray-notices", wait_s=10 * POLL_S):
        yield
