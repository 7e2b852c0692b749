"""From what Ray raises back to the error that a worker raised. Ray wraps it once or several times on its way here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lmray.errors import LmrayError


@contextmanager
def unwrapped() -> Iterator[None]:
    """Raises the LmrayError inside whatever the block raises; anything without one passes as it is."""
    try:
        yield
    except Exception as error:
        inner = error_inside(error)
        if inner is None or inner is error:
            raise
        raise inner from None


def error_inside(error: BaseException) -> LmrayError | None:
    """The LmrayError that `error` is, or carries as a cause or as a worker's failure."""
    waiting, seen = [error], set()
    while waiting:
        one = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        # Ray makes a class that is both its own error and the cause's; the message of the two is a traceback.
        if isinstance(one, LmrayError) and not hasattr(one, "traceback_str") and getattr(one, "cause", None) is None:
            return one
        waiting += [inner for inner in _inside(one) if isinstance(inner, BaseException)]
    return None


def _inside(error: BaseException) -> list:
    workers = getattr(error, "worker_failures", None) or {}
    named = [getattr(error, name, None) for name in ("cause", "controller_failure", "__cause__", "__context__")]
    return [*workers.values(), *named]


def reason(error: BaseException | None) -> str:
    """Why something failed, in a line or a few: the LmrayError inside, else the last line of Ray's traceback."""
    if error is None:
        return "unknown"
    inner = error_inside(error)
    lines = [line for line in str(error).splitlines() if line.strip()]
    return str(inner) if inner is not None else (lines[-1] if lines else type(error).__name__)
