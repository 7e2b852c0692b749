"""Evaluates what an endpoint serves again and again, while it serves: jobs of their own, beside its replicas.

Runs in the driver. What was measured, and when, is in the store, so that an endpoint that starts anew goes on with the
schedule. What got worse is logged here, and told by the gateway's metrics.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ray

from lmray.context import Result
from lmray.errors import CapacityError
from lmray.evaluate.recheck import standings, versions
from lmray.job import EvaluateJob, ScheduledEvaluation, ServeJob
from lmray.on_ray.evaluate import evaluate
from lmray.on_ray.failures import reason

LOOK_S = 10.0
"""How often is looked whether one is due."""
RETRY_S = 3600.0
"""After so long at most one that was tried is tried again, whatever came of it, unless it or its versions changed."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Tried:
    job: EvaluateJob
    versions: Mapping[str, str] | None
    """What it would have measured; none where that is not known."""
    time: float


class Evaluator:
    """Of one endpoint."""

    def __init__(
        self,
        serving: Callable[[], ServeJob],
        ends: threading.Event,
        *,
        run: Callable[..., Result] = evaluate,
        clock: Callable[[], float] = time.time,
    ):
        """`serving`: the endpoint's job as it is now. `ends`: set when it is to stop."""
        self._serving, self._ends, self._run, self._clock = serving, ends, run, clock
        self._thread = threading.Thread(target=self._work, name="lmray-evaluations", daemon=True)
        self._tried: dict[str, _Tried] = {}
        """By the name of its job."""
        self._said: dict[str, str] = {}
        """By the name of its job, what was in the way of one."""

    def start(self) -> None:
        """Does nothing where it has been started, or is to stop already."""
        if not self._thread.is_alive() and not self._ends.is_set():
            self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Returns once none runs any more. One that was given up goes on when the endpoint is started again."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def look(self) -> None:
        """Makes those that are due, one after another."""
        for one in self._serving().evaluations:
            if self._is_wanted(one):
                self._look_at(one)

    def _work(self) -> None:
        while not self._ends.wait(LOOK_S):
            self.look()

    def _is_wanted(self, one: ScheduledEvaluation) -> bool:
        """An update may leave it out, also while it runs."""
        return not self._ends.is_set() and one in self._serving().evaluations

    def _look_at(self, one: ScheduledEvaluation) -> None:
        asked, said = None, ""
        try:
            asked = versions(one.job)
            if self._is_due(one, asked):
                self._make(one, asked)
        except Exception as error:  # whatever it is, the endpoint goes on and so does this thread
            said = reason(error)
            self._tried[one.job.name] = _Tried(one.job, asked, self._clock())
        if said and said != self._said.get(one.job.name):
            _LOG.warning("evaluation `%s` could not be made: %s", one.job.name, said)
        self._said[one.job.name] = said

    def _is_due(self, one: ScheduledEvaluation, asked: Mapping[str, str]) -> bool:
        """Not while the same has been tried a short while ago."""
        now, tried, every_s = self._clock(), self._tried.get(one.job.name), 3600 * one.every_hours
        if tried and (tried.job, tried.versions) == (one.job, asked) and abs(now - tried.time) < min(every_s, RETRY_S):
            return False
        return any(each.is_due(every_s=every_s, now=now) for each in standings(one.job, now=now))

    def _make(self, one: ScheduledEvaluation, asked: Mapping[str, str]) -> None:
        _check_free(one.job)
        result = self._run(one.job, progress=False, reserves=False, ended=lambda: not self._is_wanted(one))
        if result.status == "stopped":
            return
        self._tried[one.job.name] = _Tried(one.job, asked, self._clock())
        for worse in result.details.get("worse", ()):
            _LOG.warning("evaluation `%s`: %s", one.job.name, worse)


def _check_free(job: EvaluateJob) -> None:
    """Raises CapacityError where it would wait for a GPU, and those after it for its end."""
    if asked := job.resources.gpus_per_worker:
        free = int(ray.available_resources().get("GPU", 0))
        if free < asked:
            hint = "leave it a GPU that no replica takes, or evaluate on CPUs"
            raise CapacityError("resources.gpus_per_worker", f"{asked} asked for, {free} free", hint=hint)
