"""The training program: from a job to a kept adapter. Runs on every rank; rank 0 writes the run folder.

Run folder: `job.yaml`, `plan.json`, `events.jsonl`, checkpoints, `adapter/`, `answers-*.jsonl`, `loss.png`,
`report.html`, and last `result.json`. A run whose folder holds `result.json` is done and is not run again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.files import write_atomic, write_json
from lmray.artifacts.store import open_store
from lmray.config import dump
from lmray.context import Result, RunContext
from lmray.evaluate.measure import HeldOut, Measured, measure
from lmray.job import TrainJob
from lmray.metrics.events import EventLog
from lmray.models.load import load_model
from lmray.optim.adamw import make_adamw
from lmray.train.learner import Learner
from lmray.train.loop import Loop
from lmray.train.plan import Plan, check_same_run, make_plan
from lmray.train.prepare import Prepared, prepare
from lmray.train.report import write_report

RESULT = "result.json"


def finished(folder: Path) -> Result | None:
    """The result of the run in `folder` if it is done, as `already-done`."""
    path = folder / RESULT
    if not path.is_file():
        return None
    fields = json.loads(path.read_text(encoding="utf-8"))
    return Result(**{"details": {}, **fields, "status": "already-done"})


def train(job: TrainJob, ctx: RunContext) -> Result:
    """Runs `job` to its end, or until asked to stop; goes on from the last committed checkpoint.

    Raises what planning raises, and ConfigError where the run folder holds another run.
    """
    started = time.time()
    torch.set_num_threads(ctx.threads)
    prepared = prepare(job)
    plan = make_plan(job, prepared)
    check_same_run(plan, ctx.folder)
    if (done := finished(ctx.folder)) is not None:
        return done
    again = f"once {ctx.folder} can be written, the same command goes on"
    if ctx.rank == 0:
        ctx.patience(f"writing {ctx.folder}/plan.json", lambda: _open_folder(job, plan, ctx.folder), hint=again)
    loop = Loop(job, plan, prepared, make_learner(job, plan, prepared, ctx), ctx)
    if ctx.rank == 0:
        events = EventLog(ctx.folder / "events.jsonl")
        ctx.patience(f"writing {events.path}", lambda: events.truncate_after(loop.progress.step), hint=again)
    if not loop.run():
        return Result("stopped", str(ctx.folder), seconds=time.time() - started)
    if ctx.rank != 0:
        return Result("succeeded", str(ctx.folder))
    if ctx.should_stop():  # what was trained is committed; measuring may take longer than who stops it waits
        return Result("stopped", str(ctx.folder), seconds=time.time() - started)
    measured = _measure(job, prepared, loop)
    return ctx.patience(
        f"keeping the result of {ctx.folder}",
        lambda: _finish(job, plan, prepared, loop, measured=measured, started=started),
        hint=again,
    )


def make_learner(job: TrainJob, plan: Plan, prepared: Prepared, ctx: RunContext) -> Learner:
    """The model with its adapter, placed, and its optimizer; a function of the job and the plan alone."""
    model = load_model(prepared.model.folder, plan.dtype)
    model.requires_grad_(False)
    adapted = job.adapter.attach(model, seed=job.train.seed)
    torch.manual_seed(job.train.seed)
    sharding, _ = job.sharding.resolve(workers=ctx.world_size)
    placed = sharding.place(
        adapted,
        lambda placed_model: make_adamw(
            placed_model, learning_rate=job.train.learning_rate, weight_decay=job.train.weight_decay
        ),
        ctx.device,
    )
    (objective,) = job.method.objectives()
    return Learner(placed, objective, max_grad_norm=job.train.max_grad_norm)


def _open_folder(job: TrainJob, plan: Plan, folder: Path) -> None:
    write_json(folder / "plan.json", plan.to_json())
    write_atomic(folder / "job.yaml", yaml.safe_dump(dump(job), sort_keys=False, allow_unicode=True))


def _train_metrics(folder: Path) -> dict[str, float]:
    events = EventLog(folder / "events.jsonl").read()
    last = events[-1] if events else {}
    speeds = sorted(event["train.tokens_per_s"] for event in events if "train.tokens_per_s" in event)
    median = {"train.tokens_per_s": speeds[len(speeds) // 2]} if speeds else {}
    return {name: last[name] for name in ("train.loss", "eval.loss") if name in last} | median


def _finish(
    job: TrainJob, plan: Plan, prepared: Prepared, loop: Loop, *, measured: Mapping[str, Measured], started: float
) -> Result:
    """Keeps and reports, `result.json` last; done again, it gives the same."""
    folder, model = loop.ctx.folder, loop.learner.model
    folder.stat()  # a store that is gone is not made anew below its mount
    for label, one in measured.items():
        if one.answers:
            one.save_answers(folder / f"answers-{label}.jsonl")
    adapter = folder / "adapter"
    job.adapter.save(model, adapter)
    prepared.tokenizer.save_pretrained(adapter)
    sizes = {
        "model.parameters": plan.model["parameters"],
        "model.trainable_parameters": plan.model["trainable_parameters"],
    }
    metrics = (
        sizes
        | _train_metrics(folder)
        | {name: value for one in measured.values() for name, value in one.metrics.items()}
    )
    metrics["run.seconds"] = round(time.time() - started, 3)
    base = {name: plan.model[name] for name in ("source", "revision", "digest")}
    details: dict[str, Any] = {"adapter": str(adapter), "base": base, "run_key": plan.run_key}
    kept = None
    if job.output is not None:
        artifacts = Artifacts(open_store(job.storage))
        artifact = artifacts.keep(job.output.artifact, adapter, base=base, run_key=plan.run_key, metrics=metrics)
        metrics["model.bytes"] = artifact.num_bytes
        kept = artifact.ref
    result = Result("succeeded", str(folder), kept, metrics, time.time() - started, details)
    write_report(folder, job=job, plan=plan, result=result, answers={key: one.answers for key, one in measured.items()})
    write_json(folder / RESULT, result.to_json())
    return result


def _measure(job: TrainJob, prepared: Prepared, loop: Loop) -> Mapping[str, Measured]:
    """`base` (where asked for) and `tuned`."""
    if not job.evaluate.tasks:
        return {}
    held_out = HeldOut(prepared.examples.eval, prepared.eval_rows)
    model, settings = loop.learner.model, {"device": loop.ctx.device, "threads": loop.ctx.threads}
    model.eval()
    measured = {}
    if job.evaluate.base:
        measured["base"] = measure(
            model, prepared.tokenizer, held_out, job.evaluate, adapter=None, prefix="base", **settings
        )
    measured["tuned"] = measure(
        model, prepared.tokenizer, held_out, job.evaluate, adapter="default", loss=loop.final_loss, **settings
    )
    return measured
