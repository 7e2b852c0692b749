"""The training program: from a job to a kept adapter or model. Runs on every rank; rank 0 writes the run folder.

Run folder: `job.yaml`, `plan.json`, `data.json`, `events.jsonl`, `attempts.json`, checkpoints, `adapter/` or `model/`,
`answers-*.jsonl`, `loss.png`, `report.html`, and last `result.json`; `masks.jsonl` where the method prunes,
`memory.json` where memory ran out, `stacks-RANK.txt` where a worker hung. A run whose folder holds `result.json` is
done and is not run again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.files import read_json, write_atomic, write_json
from lmray.artifacts.store import open_store
from lmray.config import dump
from lmray.context import Result, RunContext
from lmray.errors import CapacityError, DataError, DivergenceError
from lmray.evaluate.answers import answers_path, save_answers
from lmray.evaluate.confidence import deltas_json
from lmray.evaluate.kept import Kept, forget, kept_path
from lmray.evaluate.measure import HeldOut, Measured, measure
from lmray.job import TrainJob
from lmray.metrics.events import EventLog
from lmray.models.machine import keep_few_products
from lmray.trackers.base import TrackedRun
from lmray.train.hang import set_aside, watched
from lmray.train.loop import Loop
from lmray.train.model import Learnt, base_model, free_memory, make_learner, measures_base_again
from lmray.train.out_of_memory import MEASURING, noticing_shortage, with_room
from lmray.train.plan import Plan, check_same_run, continued, make_plan
from lmray.train.preflight import run_cost
from lmray.train.prepare import Prepared, prepare
from lmray.train.record import DATA, DIVERGED, JOB, PLAN, RESULT
from lmray.train.report import write_report
from lmray.train.statistics import data_statistics
from lmray.train.tracking import Tracking

BASE = ("source", "revision", "digest", "rope_scaling")
"""What an artifact says of the model it belongs to."""


class MeasuringStoppedError(Exception):
    """The run was asked to stop after its last step."""


def finished(folder: Path) -> Result | None:
    """The result of the run in `folder` if it is done, as `already-done`."""
    path = folder / RESULT
    if not path.is_file():
        return None
    fields = read_json(path, hint="remove it, and the same command measures and keeps the run's result again")
    return Result(**{"details": {}, **fields, "status": "already-done"})


def train(job: TrainJob, ctx: RunContext) -> Result:
    """Runs `job` to its end, or until asked to stop; goes on from the last committed checkpoint.

    Raises what planning raises, ConfigError where the run folder holds another run, and OutOfMemoryError on a rank that
    ran out of memory where `resources.on_oom` does not let it go on, or where there are others to begin anew with it.
    """
    started = time.time()
    torch.set_num_threads(ctx.threads)
    keep_few_products()
    with ctx.together():
        _check_workers(job, ctx)
        prepared = prepare(job)
    begun = ctx.agreed(lambda: _begin(job, prepared, ctx))
    if isinstance(begun, Result):
        return begun
    with ctx.together():
        _check_same_data(begun, prepared, ctx)
    attempt = partial(_attempt, job, begun, prepared, ctx, started=started)
    return with_room(job, begun, prepared, ctx, attempt)


def _attempt(
    job: TrainJob, plan: Plan, prepared: Prepared, ctx: RunContext, micro_batch: int, *, started: float
) -> Result:
    """Goes on from the last committed checkpoint, to the end or as far as the memory goes."""
    with noticing_shortage(step=None):
        # The loop alone holds the learner, for it lets go of it before anything is measured.
        loop = Loop(job, plan, prepared, make_learner(job, plan, prepared, ctx), ctx, micro_batch=micro_batch)
    ctx.begin_attempt(loop.progress.step)
    with Tracking(job.report_to if ctx.rank == 0 else (), _tracked(job, plan, ctx)) as tracking:
        tracking.result = _run(job, plan, prepared, loop, started=started)
    return tracking.result


def _begin(job: TrainJob, prepared: Prepared, ctx: RunContext) -> Plan | Result:
    """Rank 0's plan, which is every rank's, in the run folder; or the result of a run that is done."""
    plan = make_plan(job, prepared)
    check_same_run(plan, ctx.folder)
    if (done := finished(ctx.folder)) is not None:
        return done
    plan = continued(plan, ctx.folder)
    ctx.patience(
        f"writing {ctx.folder}/plan.json", lambda: _open_folder(job, plan, prepared, ctx.folder), hint=_again(ctx)
    )
    return plan


def _check_workers(job: TrainJob, ctx: RunContext) -> None:
    asked = job.resources.workers
    if not asked.min <= ctx.world_size <= asked.max:
        raise CapacityError(
            "resources.workers",
            f"the job asks for {asked}, {ctx.world_size} were started",
            allowed=f"{ctx.world_size}",
        )


def _check_same_data(plan: Plan, prepared: Prepared, ctx: RunContext) -> None:
    if prepared.model.digest != plan.model["digest"] or prepared.digest != plan.data["digest"]:
        what = "model" if prepared.model.digest != plan.model["digest"] else "data"
        hint = "put it where every worker sees the same: a URL, or a path that all machines share"
        raise DataError(f"run `{plan.name}`", f"worker {ctx.rank} reads another {what} than worker 0", hint=hint)


def _again(ctx: RunContext) -> str:
    return f"once {ctx.folder} can be written, the same command goes on"


def _run(job: TrainJob, plan: Plan, prepared: Prepared, loop: Loop, *, started: float) -> Result:
    ctx, prepared_s = loop.ctx, time.time() - started
    with watched(ctx, job.resources.step_timeout_s):
        if not _ran(loop):
            return Result("stopped", str(ctx.folder), seconds=time.time() - started)
        peaks = loop.peaks_by_worker()
        with noticing_shortage(None, doing="the result was gathered"):
            gathered = loop.gathered()
    if ctx.rank != 0:  # from here on rank 0 works alone, and nobody waits for it in a collective
        return Result("succeeded", str(ctx.folder))
    companion = loop.learner.companion
    kept = companion.kept() if companion else None
    learnt = Learnt(job, plan, prepared, ctx.device, gathered or loop.learner.model, kept)
    del companion
    del loop.learner  # with its optimizer, and a part of a model that nothing can be measured on
    times = {"run.prepare_seconds": prepared_s, "run.train_seconds": loop.progress.seconds}
    measuring = time.time()
    try:
        with noticing_shortage(None, doing=MEASURING):
            measured = _measure(job, plan, prepared, loop, learnt)
    except MeasuringStoppedError:
        return Result("stopped", str(ctx.folder), seconds=time.time() - started)
    held_out_s = sum(event.get("eval.seconds", 0.0) for event in EventLog(ctx.folder / "events.jsonl").read())
    times["run.evaluate_seconds"] = held_out_s + time.time() - measuring
    return ctx.patience(
        f"keeping the result of {ctx.folder}",
        lambda: _finish(loop, learnt, measured=measured, peaks=peaks, times=times, started=started),
        hint=_again(ctx),
    )


def _tracked(job: TrainJob, plan: Plan, ctx: RunContext) -> TrackedRun:
    text = yaml.safe_dump(dump(job), sort_keys=False, allow_unicode=True)
    return TrackedRun(job.name, ctx.folder, open_store(job.storage).root, plan.fields, text)


def _ran(loop: Loop) -> bool:
    """Runs the loop; a run that is given up has a report as well."""
    try:
        return loop.run()
    except DivergenceError:
        if loop.ctx.rank == 0:
            write_report(loop.ctx.folder)
        raise


def _open_folder(job: TrainJob, plan: Plan, prepared: Prepared, folder: Path) -> None:
    (folder / DIVERGED).unlink(missing_ok=True)  # an earlier attempt's
    set_aside(folder)
    write_json(folder / PLAN, plan.to_json())
    write_json(folder / DATA, data_statistics(prepared))
    write_atomic(folder / JOB, yaml.safe_dump(dump(job), sort_keys=False, allow_unicode=True))


def _train_metrics(loop: Loop) -> dict[str, float]:
    """From the whole run's events: attempts before this one count as well."""
    events = EventLog(loop.ctx.folder / "events.jsonl").read()
    last = events[-1] if events else {}
    speeds = sorted(event["train.tokens_per_s"] for event in events if "train.tokens_per_s" in event)
    metrics: dict[str, float] = {"train.steps": loop.progress.step}
    metrics |= {name: last[name] for name in ("train.loss", "eval.loss") if name in last}
    compiling = [event["train.compile_seconds"] for event in events if "train.compile_seconds" in event]
    metrics |= {"train.compile_seconds": sum(compiling)} if compiling else {}
    metrics |= {"train.tokens_per_s": speeds[len(speeds) // 2]} if speeds else {}
    gpu = [event["train.peak_gpu_memory_bytes"] for event in events if "train.peak_gpu_memory_bytes" in event]
    metrics |= {"train.peak_gpu_memory_bytes": max(gpu)} if gpu else {}
    if loop.watch.best_step is not None and loop.watch.best_loss is not None:
        metrics["train.best_step"] = loop.watch.best_step
        if loop.job.train.load_best_model_at_end:
            metrics["eval.loss"] = loop.watch.best_loss
    return metrics


def _finish(
    loop: Loop,
    learnt: Learnt,
    *,
    measured: Mapping[str, Measured],
    peaks: Sequence[float],
    times: dict[str, float],
    started: float,
) -> Result:
    """Keeps and reports, `result.json` last; done again, it gives the same."""
    job, plan, folder = loop.job, loop.plan, loop.ctx.folder
    folder.stat()  # a store that is gone is not made anew below its mount
    for label, one in measured.items():
        if one.answers:
            save_answers(one.answers, answers_path(folder, label))
    kind = job.kept
    learnt.save(folder / kind)
    loop.prepared.tokenizer.save_pretrained(folder / kind)
    if job.model.rope_scaling is not None and kind == "adapter":  # a whole model says it in its config
        job.model.rope_scaling.save(folder / kind)
    sizes = {
        "model.parameters": learnt.num_parameters,
        "model.trainable_parameters": plan.model["trainable_parameters"],
    }
    metrics = (
        sizes | _train_metrics(loop) | {name: value for one in measured.values() for name, value in one.metrics.items()}
    )
    metrics["train.peak_memory_bytes"] = max(peaks)
    metrics |= {name: round(seconds, 3) for name, seconds in times.items()}
    metrics["run.seconds"] = round(time.time() - started, 3)
    if job.resources.price_per_worker_hour is not None:
        metrics["run.cost"] = round(run_cost(job.resources, metrics["run.seconds"], workers=loop.ctx.world_size), 6)
    base = {name: plan.model[name] for name in BASE if name in plan.model}
    origin = {"kind": kind, "base": base, "parents": loop.prepared.model.parents, "run_key": plan.run_key}
    details: dict[str, Any] = {kind: str(folder / kind), **origin, "micro_batch": loop.micro_batch}
    details["peak_memory_bytes_by_worker"] = list(peaks)
    details["deltas"] = deltas_json({label: one.evidence for label, one in measured.items()})
    kept = None
    if job.output is not None:
        artifacts = Artifacts(open_store(job.storage))
        artifact = artifacts.keep(job.output.artifact, folder / kind, metrics=metrics, **origin)
        metrics["model.bytes"] = artifact.num_bytes
        kept = artifact.ref
    result = Result("succeeded", str(folder), kept, metrics, time.time() - started, details)
    write_report(folder, result)
    write_json(folder / RESULT, result.to_json())
    forget(folder)
    return result


def _measure(job: TrainJob, plan: Plan, prepared: Prepared, loop: Loop, learnt: Learnt) -> Mapping[str, Measured]:
    """`base` (where asked for) and `tuned`. An adapter is switched off to measure its base; where that does not give
    it back, the base is loaded again, and let go before what was learnt is loaded. Beside the base each example's loss
    is measured, not only known their mean: how sure their difference is takes both."""
    ctx = loop.ctx
    _check_stop(ctx)
    if not job.evaluate.tasks:
        return {}
    held_out = HeldOut(prepared.examples.eval, prepared.eval_rows)

    def measured(label: str, model: Any, adapter: str | None, **own: Any) -> Measured:
        model.eval()
        if plan.attention not in ("eager", "sdpa"):  # others know nothing of the slots that answers are generated in
            model.set_attn_implementation("sdpa")
        return measure(
            model,
            prepared.tokenizer,
            held_out,
            job.evaluate,
            adapter=adapter,
            device=ctx.device,
            threads=ctx.threads,
            progress=lambda doing, done, total: _check_stop(ctx),
            kept=_kept(loop, label),
            **own,
        )

    free_memory()
    again, handle = measures_base_again(job), None if job.kept == "model" else "default"
    model = base_model(job, plan, prepared, ctx.device).to(ctx.device) if again else learnt.whole()
    if not job.evaluate.base:
        known = loop.final_loss if learnt.kept is None else None  # what is kept is measured as it is kept
        return {"tuned": measured("tuned", model, handle, loss=known)}
    before = measured("base", model, None, prefix="base")
    if again:
        del model
        free_memory()
        model = learnt.whole()
    return {"base": before, "tuned": measured("tuned", model, handle)}


def _check_stop(ctx: RunContext) -> None:
    if ctx.asked_to_stop():  # what was trained is committed; measuring may take longer than who stops it waits
        raise MeasuringStoppedError


def _kept(loop: Loop, label: str) -> Kept:
    """What target `label` was asked in an earlier attempt; the tuned one's belongs to its step."""
    path = kept_path(loop.ctx.folder, label)
    weights = [loop.progress.step, loop.watch.best_step] if label == "tuned" else []
    hint = f"once {path} can be written, the same command goes on"
    return Kept(
        path,
        [loop.plan.run_key, dump(loop.job.evaluate), weights],
        write=lambda act: loop.ctx.patience(f"writing {path}", act, hint=hint),
    )
