"""Several ranks on one machine without Ray: each a process, as `torchrun` would start it."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

from lmray.artifacts.store import run_folder
from lmray.context import Result
from lmray.job import TrainJob
from lmray.testing.listening import free_port
from lmray.train.group import torchrun_context
from lmray.train.program import train

_PROCESSES = get_context("forkserver")
_PROCESSES.set_forkserver_preload(["lmray.train.program", "lmray.train.group"])


class RankDiedError(Exception):
    """A rank that ended without a word."""


def outcomes(count: int, act: Callable[..., Any], *args: Any, timeout_s: float = 400.0) -> list[Any]:
    """What `act(rank, *args)` gave in each of `count` processes with a process group's environment, or the exception
    that ended it. `act` must be importable. Raises TimeoutError, after ending all of them, where one hangs."""
    port, ranks = free_port(), []
    for rank in range(count):
        ours, theirs = _PROCESSES.Pipe()
        process = _PROCESSES.Process(target=_be, args=(theirs, (rank, count, port), act, args), daemon=True)
        process.start()
        theirs.close()
        ranks.append((process, ours))
    try:
        return [_outcome(process, pipe, timeout_s) for process, pipe in ranks]
    finally:
        for process, _ in ranks:
            process.kill()
            process.join()


def _outcome(process: Any, pipe: Connection, timeout_s: float) -> Any:
    if not pipe.poll(timeout_s):
        raise TimeoutError(f"a rank was not done after {timeout_s:.0f} s")
    try:
        return pipe.recv()
    except EOFError:
        process.join()
        return RankDiedError(f"exit code {process.exitcode}")


def _be(pipe: Connection, place: tuple[int, int, int], act: Callable[..., Any], args: tuple[Any, ...]) -> None:
    rank, count, port = place
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        pipe.send(act(rank, *args))
    except Exception as error:
        traceback.print_exc()
        pipe.send(error)


def run_ranks(count: int, act: Callable[..., Any], *args: Any) -> list[Any]:
    """`outcomes`, of which none may be an exception: the first is raised."""
    found = outcomes(count, act, *args)
    for one in found:
        if isinstance(one, Exception):
            raise one
    return found


def train_ranks(job: TrainJob, *, stop_at: int | None = None, workers: int | None = None) -> Result:
    """Trains `job` on its workers, each a process here: as many as it allows, or `workers`. `stop_at`: asks it to
    stop after that many steps."""
    return run_ranks(workers or job.resources.workers.max, _train, job, stop_at)[0]


def train_until_killed(job: TrainJob, *, step: int) -> list[Any]:
    """Trains `job` on two ranks, of which the second is killed as it reports `step`: what `outcomes` gives."""
    return outcomes(2, _train_and_die, job, step)


def _train_and_die(rank: int, job: TrainJob, last: int) -> None:
    with torchrun_context(run_folder(job)) as ctx:
        report = ctx.report

        def dies(step: int, metrics: Any) -> None:
            if rank == 1 and step == last:
                os.kill(os.getpid(), signal.SIGKILL)
            report(step, metrics)

        ctx.report = dies
        train(job, ctx)


def _train(rank: int, job: TrainJob, stop_at: int | None) -> Result:
    asked = iter(range(1, 10**9))
    with torchrun_context(run_folder(job), stop=lambda: stop_at is not None and next(asked) >= stop_at) as ctx:
        return train(job, ctx)
