"""Runs a job of any kind to its end: hands it to its kind's adapter, which plans first and then connects to Ray.

A SIGTERM (what `ray job stop`, Kubernetes and Slurm send) does what Ctrl-C does; a SIGUSR1 has an endpoint read its job
anew.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from queue import SimpleQueue
from typing import Any

from lmray.context import Result
from lmray.errors import ConfigError, LmrayError, RemoteError
from lmray.job import Job
from lmray.on_ray.cluster import connected
from lmray.on_ray.failures import unwrapped
from lmray.serve.prepare import prepare

ADAPTERS = {kind: (f"lmray.on_ray.{kind}", kind) for kind in ("train", "evaluate", "sweep", "generate")}
"""Kind of job -> module and function that run it; a module is imported when its kind is run."""
_LOG = logging.getLogger(__name__)


def run(job: Job, *, progress: bool = True, again: Callable[[], Job] | None = None) -> Result:
    """Runs `job` on the cluster RAY_ADDRESS names, else on a local Ray started and stopped here.

    `progress`: show it on stderr. `again` gives the job as it is now, which an endpoint serves from a SIGUSR1 on.
    Raises the LmrayError that stopped it, also when a worker raised it.
    """
    with unwrapped(), sigterm_as_interrupt():
        if job.kind == "serve":
            return _serve(job, again or (lambda: job))
        module, function = ADAPTERS[job.kind]
        return getattr(import_module(module), function)(job, progress=progress)


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Within the block SIGTERM is handled as SIGINT is, whoever handles that: Python, Ray Tune."""
    with _handling({signal.SIGTERM: _interrupt}):
        yield


def _interrupt(number: int, frame: Any) -> None:
    """Calls SIGINT's handler instead of raising it: drivers of submitted jobs may have it blocked or ignored."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):
        raise KeyboardInterrupt
    handler(signal.SIGINT, frame)


@contextmanager
def _handling(handlers: dict[int, Callable[..., Any]]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _serve(job: Any, again: Callable[[], Job]) -> Result:
    """Serves until SIGINT or SIGTERM, then takes the endpoint down; from each SIGUSR1 on, what `again` gives."""
    started, heard, ends = time.monotonic(), SimpleQueue[int](), list[int]()  # which a signal's handler may change
    prepare(job)  # what is wrong shows before Ray starts

    def hear(number: int, frame: Any) -> None:
        if number != signal.SIGUSR1:
            ends.append(number)
        heard.put(number)

    with connected(), _handling(dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGUSR1), hear)):
        try:
            service = import_module("lmray.on_ray.serve").serve(job, ended=lambda: bool(ends))
        except RemoteError:
            if not ends:
                raise
            return Result("stopped", run="", seconds=time.monotonic() - started)
        try:
            _say(f"{job.name}: serving at {service.url}; Ctrl-C stops it")
            while not ends and heard.get() == signal.SIGUSR1:
                _update(service, again)
        finally:
            service.stop()
    return Result("stopped", run="", seconds=time.monotonic() - started, details={"url": service.url})


def _update(service: Any, again: Callable[[], Job]) -> None:
    try:
        job = again()
        if job.kind != "serve":
            raise ConfigError("kind", f"is `{job.kind}` now", allowed="serve")
        service.update(job)
    except LmrayError as error:
        _say(f"{service.name}: not updated; its job stays what it was\n{error}")
    except Exception:  # a mistake of lmray's own ends no serving either
        _LOG.exception("%s: not updated; its job stays what it was", service.name)
    else:
        _say(f"{service.name}: updated")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
