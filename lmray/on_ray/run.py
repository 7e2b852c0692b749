"""Runs a job of any kind to its end: hands it to its kind's adapter, which plans first and then connects to Ray.

A SIGTERM (what `ray job stop`, Kubernetes and Slurm send) does what Ctrl-C does.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from lmray.context import Result
from lmray.job import Job
from lmray.on_ray.cluster import connected
from lmray.on_ray.failures import unwrapped
from lmray.serve.prepare import prepare

ADAPTERS = {kind: (f"lmray.on_ray.{kind}", kind) for kind in ("train", "evaluate", "sweep", "generate")}
"""Kind of job -> module and function that run it; a module is imported when its kind is run."""


def run(job: Job, *, progress: bool = True) -> Result:
    """Runs `job` on the cluster RAY_ADDRESS names, else on a local Ray started and stopped here.

    `progress`: show it on stderr. Raises the LmrayError that stopped it, also when a worker raised it.
    """
    with unwrapped(), sigterm_as_interrupt():
        if job.kind == "serve":
            return _serve(job)
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


def _serve(job: Any) -> Result:
    """Serves until SIGINT or SIGTERM, then takes the endpoint down."""
    started, stop = time.monotonic(), threading.Event()
    prepare(job)  # what is wrong shows before Ray starts
    with connected(), _handling(dict.fromkeys((signal.SIGINT, signal.SIGTERM), lambda *_: stop.set())):
        service = import_module("lmray.on_ray.serve").serve(job)
        try:
            print(f"{job.name}: serving at {service.url}; Ctrl-C stops it", file=sys.stderr, flush=True)
            stop.wait()
        finally:
            service.stop()
    return Result("stopped", run="", seconds=time.monotonic() - started, details={"url": service.url})
