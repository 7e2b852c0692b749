"""A tracker shows the numbers of many runs: a service or a viewer beside the run folder.

It is told of a run's events after they were written, so what becomes of it is nothing to the run.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Protocol

from lmray.config import MemberConfig
from lmray.errors import ConfigError


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run before its first step."""

    name: str
    folder: Path
    """The run folder."""
    store: Path
    """The folder of the store that holds it."""
    fields: Mapping[str, Any]
    """The job by dotted key."""
    job: str
    """The job as YAML."""


class Session(Protocol):
    """One run, opened in a tracker; used by one thread."""

    id: str
    """Under which the tracker finds the run again."""
    last_step: int
    """The last step that the tracker itself says it holds; 0 where it holds none or cannot tell."""

    def log(self, step: int, time_s: float, metrics: Mapping[str, float]) -> None:
        """Sends the metrics of one step, taken at `time_s` (seconds since 1970)."""
        ...

    def flush(self) -> None:
        """Returns once what was logged outlives this process, as far as the tracker can say."""
        ...

    def finish(self, status: str) -> None:
        """Ends the session. `succeeded`, `stopped` (it may be opened again), or `failed`."""
        ...


class Tracker(MemberConfig):
    """Base of `lmray/trackers/*.py`. Passwords and keys are no fields: a tracker's library finds them in the
    environment of the worker."""

    package: ClassVar[str] = ""
    """The optional package it needs; empty where lmray brings it."""

    def check(self) -> None:
        """Raises ConfigError where the package it needs is not installed."""
        if self.package and find_spec(self.package) is None:
            hint = 'pip install "lmray[trackers]", here and on the workers, or leave it out of `report_to`'
            raise ConfigError("report_to", f"`{self.name}` needs the package `{self.package}`", hint=hint)

    @abstractmethod
    def open(self, run: TrackedRun, *, session_id: str | None, after: int) -> Session:
        """Opens `run`; goes on in session `session_id` where there was one, whose steps up to `after` are sent."""
        raise NotImplementedError
