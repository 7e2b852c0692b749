"""Jobs on a cluster through the Ray Jobs API: submit once, then follow, wait for, read and stop a run from anywhere.

A run's id comes from the job's name and content, so submitting a job that is still pending or running gives that run
back, and one that ended is started anew under the next number, where it goes on from its last checkpoint.
"""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from ray.job_submission import JobDetails, JobSubmissionClient, JobType

import lmray
from lmray.artifacts.files import sha256_json
from lmray.config import dump
from lmray.context import Result
from lmray.errors import ConfigError, RemoteError, did_you_mean
from lmray.job import Job
from lmray.on_ray.cluster import package_environment
from lmray.on_ray.job_client import connect, speaking
from lmray.on_ray.portable import portable

ENTRYPOINT = "exec python -m lmray run job.yaml --json"
STOP_WAIT_S = 120
"""A stopped job gets so long to save and leave before it is killed; Ray's own default is 3."""
POLL_S = 1.0
ENDED = ("succeeded", "failed", "stopped")
MAX_MISSED_POLLS = 10


@dataclass(frozen=True)
class Run:
    """One submission of a job. `id` names it on its cluster."""

    id: str
    client: JobSubmissionClient

    def info(self) -> JobDetails:
        """What the cluster knows of it: status, message, metadata, times. Raises RemoteError."""
        with speaking(f"run `{self.id}`"):
            return self.client.get_job_info(self.id)

    def status(self) -> str:
        """`pending`, `running`, `succeeded`, `failed` or `stopped`."""
        return self.info().status.value.lower()

    def logs(self) -> str:
        """All it printed so far, both streams together."""
        with speaking(f"run `{self.id}`"):
            return self.client.get_job_logs(self.id)

    def follow(self) -> Iterator[str]:
        """What it prints, in pieces as they come, from its beginning to its end."""
        loop, pieces = asyncio.new_event_loop(), self.client.tail_job_logs(self.id)
        try:
            while True:
                with speaking(f"run `{self.id}`"):
                    try:
                        piece = loop.run_until_complete(anext(pieces))
                    except StopAsyncIteration:
                        return
                yield piece
        finally:
            loop.run_until_complete(pieces.aclose())  # type: ignore[attr-defined]  # it is an async generator
            loop.close()

    def wait(self) -> str:
        """Blocks until it ended; returns its status. A cluster that does not answer for a while is waited for."""
        missed = 0
        while True:
            try:
                status, missed = self.status(), 0
                if status in ENDED:
                    return status
            except RemoteError:
                missed += 1
                if missed > MAX_MISSED_POLLS:
                    raise
            time.sleep(POLL_S)

    def result(self) -> Result:
        """Waits for the end and gives what the job printed last. Raises RemoteError for a job that failed."""
        status = self.wait()
        printed = last_result(self.logs())
        if printed is None or printed["status"] == "failed":
            if status == "stopped":
                return Result("stopped", run="")
            found = (printed or {}).get("error") or f"{status} without a result: {_tail(self.info().message)}"
            raise RemoteError(f"run `{self.id}`", str(found), hint=f"`lmray jobs logs {self.id}` shows all it printed")
        return Result(**printed)

    def stop(self) -> bool:
        """Asks it to save and end (SIGTERM; killed after `STOP_WAIT_S`). Returns at once: whether it was running."""
        with speaking(f"run `{self.id}`"):
            return self.client.stop_job(self.id)


def submit(job: Job, *, address: str | None = None) -> Run:
    """Starts `job` on the cluster at `address`, or gives the run of it that is still going.

    Sent are the resolved job and this package, never data. Raises RemoteError for a cluster that does not answer,
    ConfigError for a path that is relative and not here.
    """
    job = portable(job, folder=Path.cwd())
    client = connect(address)
    stem = submission_stem(job)
    earlier = _numbered(client, stem)
    last = max(earlier, default=0)
    if last and not earlier[last].status.is_terminal():
        return Run(str(earlier[last].submission_id), client)
    run_id = f"{stem}-{last + 1}" if last else stem
    with tempfile.TemporaryDirectory() as folder:
        text = yaml.safe_dump(dump(job), allow_unicode=True, sort_keys=False)
        (Path(folder) / "job.yaml").write_text(text, encoding="utf-8")
        try:
            with speaking(client.get_address()):
                client.submit_job(
                    entrypoint=ENTRYPOINT,
                    submission_id=run_id,
                    runtime_env=_runtime_env(folder),
                    metadata={"lmray.kind": job.kind, "lmray.name": job.name, "lmray.version": lmray.__version__},
                )
        except RemoteError:
            if last + 1 not in _numbered(client, stem):
                raise  # else someone submitted the same job in the same moment: that run is this one
    return Run(run_id, client)


def list_jobs(address: str | None = None) -> list[JobDetails]:
    """Every job that was submitted to the cluster, oldest first."""
    return _submitted(connect(address))


def find(id: str, address: str | None = None) -> Run:
    """The run `id`, or the only one whose id starts so. Raises ConfigError naming the runs there are."""
    client = connect(address)
    ids = [str(info.submission_id) for info in _submitted(client)]
    found = [id] if id in ids else [one for one in ids if one.startswith(id)]
    if len(found) != 1:
        what = f"fits {len(found)} runs" if found else f"is not known to {client.get_address()}"
        raise ConfigError(
            f"run `{id}`", what, allowed=", ".join(found or ids) or "none yet", hint=did_you_mean(id, ids)
        )
    return Run(found[0], client)


def submission_stem(job: Job) -> str:
    """The id of the job's first submission: ASCII, from its name and content."""
    word = re.sub(r"[^A-Za-z0-9.\-]+", "-", job.name).strip("-.")[:40] or job.kind
    return f"{word}-{sha256_json(dump(job))[:10]}"


def last_result(logs: str) -> dict[str, Any] | None:
    """The last JSON object with a `status` and a `run` among the lines a job printed."""
    for line in reversed(logs.splitlines()):
        if line.startswith("{"):
            try:
                printed = json.loads(line)
            except ValueError:
                continue
            if isinstance(printed, dict) and {"status", "run"} <= printed.keys():
                return printed
    return None


def _runtime_env(folder: str) -> dict[str, Any]:
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), "PYTHONUTF8": "1"}
    return {"working_dir": folder, **package_environment(), "env_vars": variables}


def _submitted(client: JobSubmissionClient) -> list[JobDetails]:
    with speaking(client.get_address()):
        found = [info for info in client.list_jobs() if info.type == JobType.SUBMISSION]
    return sorted(found, key=lambda info: (info.start_time or 0, str(info.submission_id)))


def _numbered(client: JobSubmissionClient, stem: str) -> dict[int, JobDetails]:
    """Submissions of one job, by number."""
    found = {}
    for info in _submitted(client):
        match = re.fullmatch(re.escape(stem) + r"(?:-(\d+))?", str(info.submission_id))
        if match:
            found[int(match[1] or 1)] = info
    return found


def _tail(message: str | None) -> str:
    return (message or "no message").strip()[-2000:]
