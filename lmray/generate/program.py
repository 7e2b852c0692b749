"""The batch inference program: plans, has the missing shards answered by whoever does that, and sums up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import yaml

from lmray.artifacts.files import MANIFEST, read_json, sha256_json, write_atomic, write_json
from lmray.artifacts.store import run_folder
from lmray.config import dump
from lmray.context import Result
from lmray.errors import LmrayError
from lmray.generate.plan import OWNER, PLAN, GeneratePlan, answers_folder
from lmray.generate.shards import ShardRecord, busy_seconds
from lmray.generate.worker import Worker, shards_of
from lmray.job import GenerateJob
from lmray.metrics.display import Display, Standing
from lmray.metrics.events import EventLog

RESULT = "result.json"
Workers = Callable[[GenerateJob, GeneratePlan, Sequence[int]], Iterator[ShardRecord]]
"""Has shards answered, and gives each one's record once it is done, in any order."""


def in_this_process(job: GenerateJob, plan: GeneratePlan, shards: Sequence[int]) -> Iterator[ShardRecord]:
    """One worker here, one shard after the other."""
    with closing(Worker(job, plan, threads=job.resources.cpus_per_worker or 1)) as worker:
        for index in shards:
            yield worker.answer(index)


def finished(job: GenerateJob, plan: GeneratePlan) -> Result | None:
    """The result of this run if it is done and all its files are what they were, as `already-done`."""
    path, manifest = run_folder(job) / RESULT, answers_folder(job) / MANIFEST
    if not path.is_file() or not manifest.is_file() or len(shards_of(job, plan).done()) < plan.num_shards:
        return None
    hint = "remove it, and the same command sums the answers up again"
    if read_json(manifest, hint=hint).get("run_key") != plan.run_key:
        return None
    return Result(**{"details": {}, **read_json(path, hint=hint), "status": "already-done"})


def generate(job: GenerateJob, plan: GeneratePlan, workers: Workers, *, display: Display | None = None) -> Result:
    """Has every shard of `job` answered that is not done yet; writes `job.yaml`, `plan.json` and `events.jsonl` into
    the run folder, and beside the answers `run.json`, first, and `manifest.json`, last. Raises what the workers raise:
    what they finished before stays, and the same job goes on from there."""
    started, folder = time.time(), run_folder(job)
    shards = shards_of(job, plan)
    write_atomic(folder / "job.yaml", yaml.safe_dump(dump(job), sort_keys=False, allow_unicode=True))
    write_json(folder / PLAN, plan.to_json())
    shards.tidy()
    write_json(answers_folder(job) / OWNER, plan.owner)
    done = shards.done()
    told = _Told(folder, plan, done, display)
    remaining = [index for index in range(plan.num_shards) if index not in done]
    for record in workers(job, plan, remaining) if remaining else ():
        done[record.index] = record
        told.tell(done)
    if missing := [index for index in remaining if index not in done]:
        raise LmrayError(f"run `{job.name}`", f"ended without {len(missing)} of {plan.num_shards} shards")
    return _summed_up(job, plan, [done[index] for index in sorted(done)], time.time() - started)


class _Told:
    """Tells events and display how far the run is."""

    def __init__(
        self, folder: Path, plan: GeneratePlan, done: Mapping[int, ShardRecord], display: Display | None
    ) -> None:
        self._total, self._display = plan.data["rows"], display
        self._log = EventLog(folder / "events.jsonl")
        self._log.begin_attempt(len(done), world_size=1)
        self._began, self._before = time.time(), metrics_of([*done.values()])
        if display is not None and done:
            display.show(Standing("rows", int(self._before["generate.rows"]), self._total, "answered before"))

    def tell(self, done: Mapping[int, ShardRecord]) -> None:
        metrics = metrics_of([*done.values()])
        gone = max(time.time() - self._began, 1e-9)
        rows, tokens = (metrics[name] - self._before[name] for name in ("generate.rows", "generate.completion_tokens"))
        metrics["generate.tokens_per_s"] = tokens / gone
        self._log.append(len(done), metrics)
        if self._display is not None:
            facts = f"{tokens / gone:,.1f} tokens/s"
            facts += f"  {metrics['generate.errors']:,} errors" if metrics["generate.errors"] else ""
            num_done = int(metrics["generate.rows"])
            left_s = (self._total - num_done) * gone / rows if rows else None
            self._display.show(Standing("rows", num_done, self._total, facts, left_s))


def metrics_of(records: Sequence[ShardRecord]) -> dict[str, float]:
    """The sums over `records`, and the speed while at least one was in the making."""
    tokens = sum(one.completion_tokens for one in records)
    return {
        "generate.rows": sum(one.rows for one in records),
        "generate.errors": sum(one.errors for one in records),
        "generate.prompt_tokens": sum(one.prompt_tokens for one in records),
        "generate.completion_tokens": tokens,
        "generate.tokens_per_s": round(tokens / max(busy_seconds(records), 1e-9), 3),
    }


def _summed_up(job: GenerateJob, plan: GeneratePlan, records: Sequence[ShardRecord], seconds: float) -> Result:
    metrics, answers, folder = metrics_of(records), answers_folder(job), run_folder(job)
    files = {name: facts for one in records for name, facts in one.files.items()}
    totals: dict[str, Any] = {name.removeprefix("generate."): value for name, value in metrics.items()}
    totals["seconds"] = round(busy_seconds(records), 3)
    digest = sha256_json([facts["sha256"] for _, facts in sorted(files.items())])
    head = {"run": job.name, "run_key": plan.run_key, "model": plan.model, "adapters": plan.adapters}
    write_json(answers / MANIFEST, {**head, **totals, "digest": digest, "files": dict(sorted(files.items()))})
    details = {"answers": str(answers), "digest": digest}
    metrics["run.seconds"] = round(seconds, 3)
    result = Result("succeeded", str(folder), metrics=metrics, seconds=seconds, details=details)
    write_json(folder / RESULT, result.to_json())
    return result
