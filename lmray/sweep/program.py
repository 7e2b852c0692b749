"""A sweep without Ray: the job of each trial, the state of each trial on disk, the ranking, the best job.

Below the sweep's run folder, `trials/ID/` is a training run's folder with `trial.json` (its values) in it, and one of
`result.json` (it finished), `stopped.json` (the scheduler ended it), `error.json` (what ended it).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from lmray.artifacts.files import write_atomic, write_json
from lmray.config import dump
from lmray.errors import ConfigError
from lmray.job import SweepJob, TrainJob
from lmray.metrics.display import Standing
from lmray.metrics.events import read_events

PLACEMENT = ("name", "storage", "max_concurrent_trials", "job.name", "job.storage", "job.resources", "job.output")
"""Fields of a sweep that do not change what its trials compute."""
ENDINGS = ("result.json", "error.json", "stopped.json")
"""One of them lies in the folder of a trial that has ended."""


@dataclass(frozen=True)
class Trial:
    """One point of the space and what became of it."""

    id: str
    values: Mapping[str, Any]
    state: str
    """`finished`, `stopped` (by the scheduler), `failed` or `unfinished`."""
    objective: float | None = None
    """The deciding metric where it was last measured."""
    step: int = 0
    """Optimizer steps done."""
    seconds: float = 0.0
    """Time between its first and its last report."""
    error: str = ""
    details: Mapping[str, Any] | None = None
    """Of a finished trial: `kind`, the folder under that name, `base`, `run_key`."""


def objective_of(sweep: SweepJob) -> tuple[str, str]:
    """The metric that decides, and `min` or `max`."""
    ((metric, mode),) = sweep.objectives.items()
    return metric, mode


def check_sweep(sweep: SweepJob, folder: Path) -> None:
    """Raises ConfigError where the job cannot be a trial's, or `folder` holds another sweep under the same name."""
    if sweep.job.resources.workers.max != 1:
        hint = "set `job.resources.workers=1`; `max_concurrent_trials` is how many run side by side"
        raise ConfigError(
            "job.resources.workers", f"a trial runs on one worker, not {sweep.job.resources.workers}", hint=hint
        )
    if sweep.job.data.eval is None:
        raise ConfigError("job.data.eval", "is missing, so no trial can be judged", hint="add `eval: {split: 0.1}`")
    path = folder / "job.yaml"
    if not path.is_file():
        return
    hint = f"give the sweep another `name`, or remove {folder} to start over"
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError:
        raise ConfigError(str(path), "is spoilt: it is no job", hint=hint) from None
    changed = sorted(_differences(before, dump(sweep), ""))
    if changed:
        raise ConfigError(f"sweep `{sweep.name}`", f"is already there with another {', '.join(changed)}", hint=hint)


def _differences(before: Any, now: Any, key: str) -> Iterator[str]:
    """Dotted keys at which two dumped sweeps compute something else."""
    if key in PLACEMENT:
        return
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {*before, *now}:
            yield from _differences(before.get(name), now.get(name), f"{key}.{name}".lstrip("."))
    elif before != now:
        yield key


def job_of(sweep: SweepJob) -> TrainJob:
    """The job that is varied, in the sweep's store where it names none: there lie the models it may start from."""
    return sweep.job.model_copy(update={"storage": sweep.job.storage or sweep.storage})


def trial_job(sweep: SweepJob, values: Mapping[str, Any], trial_id: str) -> TrainJob:
    """The job of one trial: judged by its held-out loss alone, kept nowhere, and saved each time it is judged."""
    changes = {**values, "name": f"trial-{trial_id}", "output": None, "evaluate.tasks": [], "evaluate.base": False}
    if sweep.scheduler.name != "none":
        changes["train.eval_steps"] = sweep.scheduler.grace_steps
        changes["train.save_steps"] = min(sweep.job.train.save_steps, sweep.scheduler.grace_steps)
    return job_of(sweep).changed(changes)


def best_job(sweep: SweepJob, trial: Trial) -> TrainJob:
    """The job as it was given with the best trial's values: what `lmray run` repeats."""
    return job_of(sweep).changed({**trial.values, "name": f"{sweep.name[:59]}-best"})


def open_trial(folder: Path, values: Mapping[str, Any]) -> None:
    """Marks `folder` as a trial's."""
    write_json(folder / "trial.json", {"values": dict(values)})


def mark_stopped(folder: Path, step: int) -> None:
    """Notes that the scheduler ended the trial in `folder`."""
    write_json(folder / "stopped.json", {"step": step})


def mark_failed(folder: Path, error: str) -> None:
    """Notes what ended the trial in `folder`."""
    write_json(folder / "error.json", {"error": error})


def read_trials(folder: Path, metric: str) -> tuple[Trial, ...]:
    """Every trial below a sweep's run folder as it stands, by id."""
    found = sorted(path.parent for path in (folder / "trials").glob("*/trial.json"))
    return tuple(_read_trial(path, metric) for path in found)


def standing(folder: Path, sweep: SweepJob) -> Standing:
    """How many trials have ended, and the best objective of those that finished."""
    metric, mode = objective_of(sweep)
    ended = {path.parent for name in ENDINGS for path in (folder / "trials").glob(f"*/{name}")}
    results = [result for trial in ended if (result := _json(trial / "result.json"))]
    best = {"min": min, "max": max}[mode]((result["metrics"][metric] for result in results), default=None)
    return Standing("trials", len(ended), sweep.search.num_trials, f"best {metric} {shown(best)}" if results else "")


def _read_trial(folder: Path, metric: str) -> Trial:
    events = read_events(folder / "events.jsonl")
    measured = [event[metric] for event in events if metric in event]
    result, error = _json(folder / "result.json"), _json(folder / "error.json")
    states = (("finished", result), ("failed", error), ("stopped", _json(folder / "stopped.json")))
    return Trial(
        id=folder.name,
        values=(_json(folder / "trial.json") or {})["values"],
        state=next((state for state, there in states if there is not None), "unfinished"),
        objective=((result or {}).get("metrics") or {}).get(metric, measured[-1] if measured else None),
        step=events[-1]["step"] if events else 0,
        seconds=round(events[-1]["time"] - events[0]["time"], 3) if events else 0.0,
        error=(error or {}).get("error", ""),
        details=(result or {}).get("details"),
    )


def _json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def ranked(trials: Sequence[Trial], mode: str) -> tuple[Trial, ...]:
    """Best first: finished trials by objective, then those stopped early by how far they came, then the rest."""
    sign = 1.0 if mode == "min" else -1.0

    def order(trial: Trial) -> tuple:
        value = float("inf") if trial.objective is None else sign * trial.objective
        if trial.state == "finished":
            return (0, 0, value, trial.id)
        return ({"stopped": 1, "unfinished": 2}.get(trial.state, 3), -trial.step, value, trial.id)

    return tuple(sorted(trials, key=order))


def rows(trials: Sequence[Trial]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of `trials`, in their order."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.values))
    head = ["#", "trial", "state", "step", "objective", *keys]
    body = [
        [
            str(place),
            one.id,
            one.state,
            str(one.step),
            shown(one.objective),
            *(shown(one.values.get(key)) for key in keys),
        ]
        for place, one in enumerate(trials, 1)
    ]
    return head, body


def shown(value: Any) -> str:
    """A value in a table: numbers short, nothing as `-`."""
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def write_outcome(folder: Path, sweep: SweepJob, trials: Sequence[Trial], *, status: str, artifact: str | None) -> None:
    """Writes `sweep.json` and, where a trial finished, `best.yaml`. `trials` are ranked."""
    metric, mode = objective_of(sweep)
    best = trials[0] if trials and trials[0].state == "finished" else None
    if best is not None:
        text = yaml.safe_dump(dump(best_job(sweep, best)), sort_keys=False, allow_unicode=True)
        write_atomic(folder / "best.yaml", text)
    content = {
        "status": status,
        "objective": metric,
        "mode": mode,
        "best": best.id if best else None,
        "artifact": artifact,
    }
    write_json(folder / "sweep.json", content | {"trials": [asdict(trial) for trial in trials]})
