"""A sweep over Ray Tune: each trial is the training program in a Tune function, without a nested Ray Train.

Trials keep their own run folders below the sweep's, so a sweep or a trial that was killed goes on from there. Search
and early stopping are Tune's; its state (pickles) lies in the sweep's own folder and is read from nowhere else.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import optuna
import ray.tune
import yaml
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch

from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.files import check_writable, only_writer, read_json, write_atomic
from lmray.artifacts.store import Store, open_store, run_folder
from lmray.config import dump
from lmray.config.search import Space
from lmray.context import LocalContext, Result, RunContext
from lmray.errors import LmrayError
from lmray.job import SweepJob, TrainJob
from lmray.metrics.display import followed
from lmray.on_ray.cluster import check_resources, cluster_resources, connected
from lmray.on_ray.failures import reason
from lmray.sweep.picture import plot_sweep
from lmray.sweep.program import (
    ENDINGS,
    Trial,
    check_sweep,
    job_of,
    mark_failed,
    mark_stopped,
    objective_of,
    open_trial,
    ranked,
    read_trials,
    rows,
    shown,
    standing,
    trial_job,
    write_outcome,
)
from lmray.train.plan import make_plan
from lmray.train.program import train as train_program

Train = Callable[[TrainJob, RunContext], Result]
NO_LIMIT = 10**9
"""ASHA's `max_t`: a trial ends when its job does, not earlier."""
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


class TuneContext(LocalContext):
    """A trial's surroundings: its own run folder, and Tune told of every measured objective."""

    def __init__(self, folder: Path, *, objective: str, scratch: Path, device: str, threads: int):
        super().__init__(folder, scratch=scratch, device=device, threads=threads)
        self.objective = objective

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        super().report(step, metrics)
        # The last step is reported once the trial is whole: a scheduler that ends it there would cost its adapter.
        if self.objective in metrics and step != self._last_step():
            ray.tune.report({"step": step, self.objective: metrics[self.objective]})

    def _last_step(self) -> int | None:
        path = self.folder / "plan.json"
        return json.loads(path.read_text(encoding="utf-8"))["steps"] if path.is_file() else None


def sweep(job: SweepJob, *, progress: bool = True, train: Train = train_program) -> Result:
    """Runs the sweep on the cluster and keeps the best trial's adapter; goes on where an earlier attempt stopped.

    Raises what planning its job raises before Ray is started or anything written, CapacityError for resources that
    are not there, and LmrayError with the first trial's reason where every trial failed.
    """
    started, store, folder = time.monotonic(), open_store(job.storage), run_folder(job)
    check_sweep(job, folder)
    if (done := _finished(folder)) is not None:
        return done
    make_plan(job_of(job))
    check_writable(folder)
    with connected():
        check_resources(job.job.resources)
        with only_writer(folder):
            write_atomic(folder / "job.yaml", yaml.safe_dump(dump(job), sort_keys=False, allow_unicode=True))
            _quieten()
            placed = job.model_copy(update={"storage": str(store.root)})  # a worker's own default may be another
            with followed(lambda: standing(folder, job)) if progress else nullcontext():
                trials = _tuner(placed, folder, train, progress).fit()
            _settle(folder, trials)
    return _conclude(job, folder, store, started, progress=progress)


def _quieten() -> None:
    os.environ |= ENVIRONMENT
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    for name in ("ray.tune", "optuna"):  # what happens to a trial is said by the Watcher
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _tuner(job: SweepJob, folder: Path, train: Train, progress: bool) -> ray.tune.Tuner:
    resources = _share(job)
    trainable = ray.tune.with_resources(_trainable(job, folder, train, resources["CPU"]), resources)
    state = folder / "tune"
    if ray.tune.Tuner.can_restore(str(state)):
        return ray.tune.Tuner.restore(str(state), trainable, resume_errored=True)
    for stale in (state, folder / "trials"):
        shutil.rmtree(stale, ignore_errors=True)
    (folder / "trials").mkdir(parents=True)
    metric, mode = objective_of(job)
    return ray.tune.Tuner(
        trainable,
        param_space={key: _domain(space) for key, space in job.space.items()},
        tune_config=ray.tune.TuneConfig(
            metric=metric,
            mode=mode,
            search_alg=_searcher(job),
            scheduler=_scheduler(job),
            num_samples=job.search.num_trials,
            max_concurrent_trials=job.max_concurrent_trials if job.search.name == "optuna" else None,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=ray.tune.RunConfig(
            name=state.name,
            storage_path=str(folder),
            verbose=0,
            failure_config=ray.tune.FailureConfig(max_failures=job.job.resources.max_failures),
            callbacks=[Watcher(job, folder, progress)],
        ),
    )


def _settle(folder: Path, grid: ray.tune.ResultGrid) -> None:
    """Notes on disk what Tune knows of failed trials, and removes trials it has forgotten: those that began after its
    last snapshot before a kill."""
    errors = {Path(outcome.path).name: outcome.error for outcome in grid}
    for place in (folder / "trials").iterdir():
        if place.name not in errors:
            shutil.rmtree(place)
        elif errors[place.name] is not None:
            mark_failed(place, reason(errors[place.name]))


def _share(job: SweepJob) -> dict[str, Any]:
    """CPUs and GPUs of one trial: as its job says, else an even share of the smallest node."""
    wanted = job.job.resources
    smallest = min((node.cpus for node in cluster_resources().nodes if node.cpus), default=1.0)  # a head may offer none
    cpus = wanted.cpus_per_worker or max(1, int(smallest // job.max_concurrent_trials))
    return {"CPU": cpus} | ({"GPU": wanted.gpus_per_worker} if wanted.gpus_per_worker else {})


def _domain(space: Space) -> Any:
    """Choices are drawn by their place: they may be lists, which a searcher cannot compare."""
    if space.choice is not None:
        return ray.tune.choice(list(range(len(space.choice))))
    return ray.tune.uniform(*space.uniform) if space.uniform else ray.tune.loguniform(*(space.loguniform or ()))


def _values(job: SweepJob, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """What was drawn, as values of the job's keys."""
    choices = {key: space.choice for key, space in job.space.items()}
    return {key: choices[key][value] if choices[key] is not None else float(value) for key, value in drawn.items()}  # type: ignore[index]


def _searcher(job: SweepJob) -> Any:
    if job.search.name == "random":
        return BasicVariantGenerator(random_state=job.search.seed, max_concurrent=job.max_concurrent_trials)
    start = min(10, max(3, job.search.num_trials // 3))  # optuna's own 10 would leave a short sweep to chance
    sampler = optuna.samplers.TPESampler(seed=job.search.seed, n_startup_trials=start, constant_liar=True)
    metric, mode = objective_of(job)
    return OptunaSearch(metric=metric, mode=mode, sampler=sampler)


def _scheduler(job: SweepJob) -> Any:
    if job.scheduler.name == "none":
        return FIFOScheduler()
    grace, factor = job.scheduler.grace_steps, job.scheduler.reduction_factor
    return ASHAScheduler(time_attr="step", grace_period=grace, reduction_factor=factor, max_t=NO_LIMIT)


def _trainable(job: SweepJob, folder: Path, train: Train, threads: int) -> Callable[[dict[str, Any]], None]:
    """The function each trial's process runs."""
    metric, _ = objective_of(job)
    device = "cuda:0" if job.job.resources.gpus_per_worker else "cpu"

    def trial(drawn: dict[str, Any]) -> None:
        identity = ray.tune.get_context().get_trial_id()
        place, values = folder / "trials" / identity, _values(job, drawn)
        open_trial(place, values)
        (place / "error.json").unlink(missing_ok=True)
        if (done := _finished(place)) is not None:  # after the last snapshot of Tune's state before a kill
            ray.tune.report({"step": NO_LIMIT, metric: done.metrics[metric]})
            return
        scratch = Path(tempfile.mkdtemp(prefix="lmray-trial-"))
        try:
            ctx = TuneContext(place, objective=metric, scratch=scratch, device=device, threads=threads)
            result = train(trial_job(job, values, identity), ctx)
            ray.tune.report({"step": NO_LIMIT, metric: result.metrics[metric]})
        except LmrayError as error:
            if not error.final:
                raise  # worth another try
            mark_failed(place, str(error))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    return trial


class Watcher(ray.tune.Callback):
    """Runs in the driver: notes which trials the scheduler ended, and says on stderr what happens."""

    def __init__(self, job: SweepJob, folder: Path, progress: bool):
        self.job, self.folder, self.progress = job, folder, progress

    def on_trial_start(self, iteration, trials, trial, **info) -> None:
        words = ", ".join(f"{key}={shown(value)}" for key, value in _values(self.job, trial.config).items())
        self._say(trial, f"starts with {words}")

    def on_trial_result(self, iteration, trials, trial, result, **info) -> None:
        metric, _ = objective_of(self.job)
        if result.get("step", NO_LIMIT) != NO_LIMIT:
            self._say(trial, f"step {result['step']}: {metric} {result[metric]:.4f}")

    def on_trial_complete(self, iteration, trials, trial, **info) -> None:
        place = self.folder / "trials" / trial.trial_id
        if not any((place / name).is_file() for name in ENDINGS):
            mark_stopped(place, int(trial.last_result.get("step", 0)))
        (one,) = (one for one in read_trials(self.folder, objective_of(self.job)[0]) if one.id == trial.trial_id)
        words = {"stopped": f"stopped early at step {one.step}", "failed": f"failed: {one.error}"}
        self._say(trial, words.get(one.state, f"finished: {objective_of(self.job)[0]} {shown(one.objective)}"))

    def on_trial_error(self, iteration, trials, trial, **info) -> None:
        self._say(trial, f"failed: {reason(trial.get_error())}")

    def _say(self, trial: Any, text: str) -> None:
        if self.progress:
            print(f"trial {trial.trial_id}: {text}", file=sys.stderr, flush=True)


def _finished(folder: Path) -> Result | None:
    path = folder / "result.json"
    if not path.is_file():
        return None
    fields = read_json(path, hint="remove it, and the same command writes it again")
    return Result(**{"details": {}, **fields, "status": "already-done"})


def _conclude(job: SweepJob, folder: Path, store: Store, started: float, *, progress: bool) -> Result:
    """Ranks what there is, writes table, picture and best job, keeps the best adapter once nothing is left to run."""
    metric, mode = objective_of(job)
    trials = ranked(read_trials(folder, metric), mode)
    whole = len(trials) >= job.search.num_trials and not any(trial.state == "unfinished" for trial in trials)
    best = trials[0] if trials and trials[0].state == "finished" else None
    status = "stopped" if not whole else "succeeded" if best else "failed"
    kept = _keep(job, store, best) if whole and best else None
    write_outcome(folder, job, trials, status=status, artifact=kept)
    plot_sweep(folder / "sweep.png", job, trials)
    if progress:
        _print_table(trials)
    if status == "failed":
        raise LmrayError(
            f"sweep `{job.name}`", f"all {len(trials)} trials failed: {trials[0].error}", hint=f"see {folder}/trials"
        )
    metrics = {metric: best.objective} if best and best.objective is not None else {}
    details = {"trials": len(trials), "best": best.id, "values": dict(best.values)} if best else {"trials": len(trials)}
    result = Result(status, str(folder), kept, metrics, time.monotonic() - started, details)
    if whole:
        write_atomic(folder / "result.json", json.dumps(result.to_json(), indent=2, ensure_ascii=False) + "\n")
    return result


def _keep(job: SweepJob, store: Store, best: Trial) -> str | None:
    if job.job.output is None or best.details is None:
        return None
    metric, _ = objective_of(job)
    metrics = {metric: best.objective} if best.objective is not None else {}
    artifact = Artifacts(store).keep(
        job.job.output.artifact,
        Path(best.details[best.details["kind"]]),
        metrics=metrics,
        kind=best.details["kind"],
        base=best.details["base"],
        parents=tuple(best.details["parents"]),
        run_key=best.details["run_key"],
    )
    return artifact.ref


def _print_table(trials: tuple[Trial, ...]) -> None:
    head, body = rows(trials)
    widths = [max(len(line[column]) for line in (head, *body)) for column in range(len(head))]
    for line in (head, *body):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip(), file=sys.stderr)
