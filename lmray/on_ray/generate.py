"""Batch inference on Ray Data: shards are the rows of a data set that a pool of workers, an engine each, maps over.

What passes through Ray Data is a shard's number and its record; prompts and answers go through files. It sends a shard
whose worker died to another one, and between `resources.workers.min` and `max` the pool follows the room there is.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict
from typing import Any

import ray.data
from ray.data import ActorPoolStrategy, DataContext

from lmray import errors
from lmray.artifacts.files import only_writer
from lmray.artifacts.store import run_folder
from lmray.context import Result
from lmray.errors import LmrayError
from lmray.generate.plan import GeneratePlan, check_begin, make_plan, prepare
from lmray.generate.program import finished
from lmray.generate.program import generate as generate_program
from lmray.generate.shards import ShardRecord
from lmray.generate.worker import Worker
from lmray.job import GenerateJob
from lmray.metrics.display import make_display
from lmray.on_ray.cluster import connected
from lmray.on_ray.train import placed


def generate(job: GenerateJob, *, progress: bool = True) -> Result:
    """Answers the prompts of `job` on the cluster; after an interrupt or a failure the same job goes on with the shards
    that are missing. Raises what planning raises before Ray is started or anything written.

    `progress`: show it on stderr."""
    plan = make_plan(job, prepare(job))
    check_begin(job, plan)
    if progress:
        print("\n".join(plan.lines()), file=sys.stderr, flush=True)
    if (done := finished(job, plan)) is not None:
        return done
    with connected():
        job = placed(job)
        with only_writer(run_folder(job)), closing(make_display()) if progress else nullcontext() as display:
            return generate_program(job, plan, _pool, display=display)


def _pool(job: GenerateJob, plan: GeneratePlan, shards: Sequence[int]) -> Iterator[ShardRecord]:
    """Records of `shards` as they are done, by a pool of workers."""
    resources = job.resources
    with DataContext.current(_context()):
        numbers = ray.data.from_items([{"shard": index} for index in shards], override_num_blocks=len(shards))
        records = numbers.map_batches(
            _Answers,
            batch_size=1,
            compute=ActorPoolStrategy(
                min_size=min(resources.workers.min, len(shards)),
                max_size=min(resources.workers.max, len(shards)),
                max_tasks_in_flight_per_actor=1,  # a shard that waits for one worker could be done by another
            ),
            num_cpus=resources.cpus_per_worker or 1,
            num_gpus=resources.gpus_per_worker or None,
            fn_constructor_kwargs={"job": job, "plan": plan},
        )
        for batch in records.iter_batches(batch_size=None, prefetch_batches=0):
            for told in batch["told"]:
                yield _record(json.loads(str(told)))


def _context() -> DataContext:
    """Ray Data's settings for work of which a piece may take hours, and of which lmray shows the progress."""
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0  # of shards a worker: it has one at a time
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":  # Ray Data's own
            handler.setLevel(logging.CRITICAL)  # what fails is raised
    return context


class _Answers:
    """A worker of the pool. What it raises on purpose it hands back: of an exception Ray Data keeps the text alone."""

    def __init__(self, job: GenerateJob, plan: GeneratePlan):
        self._job, self._plan = job, plan
        self._worker: Worker | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        try:
            worker = self._worker = self._worker or self._started()
            told = [{"record": asdict(worker.answer(int(index)))} for index in batch["shard"]]
        except LmrayError as error:
            fields = {"where": error.where, "found": error.found, "allowed": error.allowed, "hint": error.hint}
            told = [{"error": type(error).__name__, "fields": fields}]
        return {"told": [json.dumps(one) for one in told]}

    def _started(self) -> Worker:
        resources = self._job.resources
        device = "cuda" if resources.gpus_per_worker else "cpu"
        return Worker(self._job, self._plan, device=device, threads=resources.cpus_per_worker or 1)


def _record(told: dict[str, Any]) -> ShardRecord:
    """What a worker told. Raises the error that it handed back."""
    if "error" in told:
        raise getattr(errors, told["error"], LmrayError)(**told["fields"])
    return ShardRecord(**told["record"])
