"""What a training run left in its folder, read back: for its report, and to compare it with others."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmray.artifacts.files import write_atomic
from lmray.context import Result
from lmray.errors import ArtifactError
from lmray.evaluate.answers import Answer, read_answers
from lmray.metrics.events import Attempt, metrics_of, read_attempts, read_events
from lmray.train.plan import Plan

RESULT, PLAN, JOB, DATA, DIVERGED = "result.json", "plan.json", "job.yaml", "data.json", "diverged.json"
MEMORY = "memory.json"


@dataclass(frozen=True)
class Record:
    """One run, finished or not."""

    folder: Path
    plan: Plan
    job: str
    """Its `job.yaml`."""
    events: Sequence[Mapping[str, Any]]
    attempts: Sequence[Attempt]
    result: Result | None
    """None while it goes on, and where it was stopped or failed."""
    answers: Mapping[str, Sequence[Answer]]
    """By target, like `base` and `tuned`."""
    data: Mapping[str, Any]
    """See `data_statistics`."""
    diverged: Mapping[str, Any] | None
    """Why it was given up, where it was."""
    memory: Mapping[str, Any] | None = None
    """Where it ran out of memory, if it did; see `lmray.train.out_of_memory`."""

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def step(self) -> int:
        return self.events[-1]["step"] if self.events else 0

    @property
    def status(self) -> str:
        """In words."""
        if self.result is not None:
            return self.result.status
        words = "failed" if self.diverged else "not finished"
        return f"{words}, step {self.step} of {self.plan.steps}"

    @property
    def metrics(self) -> Mapping[str, float]:
        """The result's; of an unfinished run, the last value that its events hold of each."""
        if self.result is not None:
            return self.result.metrics
        return {name: value for event in self.events for name, value in metrics_of(event).items()}

    @property
    def deltas(self) -> Mapping[str, Mapping[str, float]]:
        """By metric: what tuning changed, with its interval; where the untouched model was measured too."""
        return (self.result.details if self.result else {}).get("deltas", {}).get("tuned", {})


def read_record(folder: Path) -> Record:
    """The run in `folder`. Raises ArtifactError where there is none, or one that another version of lmray wrote."""
    try:
        plan = Plan(**json.loads((folder / PLAN).read_text(encoding="utf-8")))
        result = _json(folder / RESULT)
        return Record(
            folder=folder,
            plan=plan,
            job=(folder / JOB).read_text(encoding="utf-8"),
            events=read_events(folder / "events.jsonl"),
            attempts=read_attempts(folder),
            result=Result(**result) if result else None,
            answers=read_answers(folder),
            data=_json(folder / DATA) or {},
            diverged=_json(folder / DIVERGED),
            memory=_json(folder / MEMORY),
        )
    except OSError as error:
        hint = "give the folder of a training run, or its name in the store"
        raise ArtifactError(str(folder), f"is no training run: {error.strerror}", hint=hint) from None
    except (TypeError, ValueError) as error:
        hint = "read it with the version of lmray that wrote it"
        raise ArtifactError(str(folder), f"was written in another form: {error}", hint=hint) from None


def add_line(path: Path, line: Mapping[str, Any]) -> None:
    """Adds `line`, of its `step`, to the log at `path`, from which what an earlier attempt wrote of that step or later
    ones is dropped."""
    before = [one for one in read_events(path) if one["step"] < line["step"]]
    write_atomic(path, "".join(json.dumps(one) + "\n" for one in [*before, line]))


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
