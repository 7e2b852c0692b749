"""Runs the evaluation program as one Ray task with the job's resources."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lmray.artifacts.files import check_writable, only_writer
from lmray.artifacts.store import run_folder
from lmray.context import LocalContext, Result
from lmray.evaluate.program import evaluate as evaluate_program
from lmray.evaluate.program import prepare
from lmray.evaluate.progress import follow
from lmray.job import EvaluateJob
from lmray.on_ray.cluster import connected
from lmray.on_ray.train import placed

POLL_S = 1.0
STOP_TIMEOUT_S = 10.0
"""What a task that was asked to end may take until this process ends without it."""


def evaluate(
    job: EvaluateJob, *, progress: bool = True, reserves: bool = True, ended: Callable[[], bool] = lambda: False
) -> Result:
    """Evaluates `job` on the cluster; after an interrupt the same job goes on with what it had not asked yet.

    `progress`: show it on stderr. `reserves`: it takes its CPU cores away from others; without, it needs no room.
    `ended` says whether to give up, for threads, which no signal interrupts: the result is `stopped` then."""
    prepare(job)
    check_writable(run_folder(job))
    if ended():
        return Result("stopped", run=str(run_folder(job)))
    with connected():
        job = placed(job)
        options: dict[str, Any] = {"num_cpus": job.resources.cpus_per_worker}
        if not reserves:
            options = {"num_cpus": 0, "scheduling_strategy": _where_cores_are()}
        options["num_gpus"] = job.resources.gpus_per_worker
        task = ray.remote(**options, max_retries=job.resources.max_failures)(_evaluate)
        folder = run_folder(job)
        with only_writer(folder), follow(folder) if progress else nullcontext():
            return _outcome(task.remote(job), ended) or Result("stopped", run=str(folder))


def _where_cores_are() -> NodeAffinitySchedulingStrategy:
    """Ray would take any node for what reserves no core, such as a head that offers none."""
    nodes = [one for one in ray.nodes() if one["Alive"]]
    largest = max(nodes, key=lambda one: one["Resources"].get("CPU", 0.0))
    return NodeAffinitySchedulingStrategy(largest["NodeID"], soft=True)


def _outcome(running: ray.ObjectRef, ended: Callable[[], bool]) -> Result | None:
    """What the task gives; nothing where it has `ended` before. An interrupt ends the task too: the cluster may outlive
    this process's wish for it."""
    try:
        while not ended():
            if ray.wait([running], timeout=POLL_S)[0]:
                return ray.get(running)
    except KeyboardInterrupt:
        _cancel(running)
        raise
    _cancel(running)
    return None


def _cancel(running: ray.ObjectRef) -> None:
    ray.cancel(running)
    if not ray.wait([running], timeout=STOP_TIMEOUT_S)[0]:
        ray.cancel(running, force=True)  # else it would write beside whoever goes on with the run


def _evaluate(job: EvaluateJob) -> Result:
    scratch = Path(tempfile.mkdtemp(prefix="lmray-"))
    device = "cuda" if job.resources.gpus_per_worker else "cpu"
    context = LocalContext(run_folder(job), scratch=scratch, device=device, threads=job.resources.cpus_per_worker or 1)
    try:
        return evaluate_program(job, context)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
