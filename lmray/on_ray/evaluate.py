"""Runs the evaluation program as one Ray task with the job's resources."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path

import ray

from lmray.artifacts.files import only_writer
from lmray.artifacts.store import run_folder
from lmray.context import LocalContext, Result
from lmray.evaluate.program import evaluate as evaluate_program
from lmray.evaluate.program import prepare
from lmray.evaluate.progress import follow
from lmray.job import EvaluateJob
from lmray.on_ray.cluster import connected
from lmray.on_ray.train import placed


def evaluate(job: EvaluateJob, *, progress: bool = True) -> Result:
    """Evaluates `job` on the cluster; runs again from the start if it was interrupted. `progress`: show it on
    stderr."""
    prepare(job)
    with connected():
        job = placed(job)
        options = {"num_cpus": job.resources.cpus_per_worker, "num_gpus": job.resources.gpus_per_worker}
        task = ray.remote(**options, max_retries=job.resources.max_failures)(_evaluate)
        folder = run_folder(job)
        with only_writer(folder), follow(folder) if progress else nullcontext():
            return ray.get(task.remote(job))


def _evaluate(job: EvaluateJob) -> Result:
    scratch = Path(tempfile.mkdtemp(prefix="lmray-"))
    device = "cuda" if job.resources.gpus_per_worker else "cpu"
    context = LocalContext(run_folder(job), scratch=scratch, device=device, threads=job.resources.cpus_per_worker or 1)
    try:
        return evaluate_program(job, context)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
