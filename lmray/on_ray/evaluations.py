"""Evaluates what an endpoint serves again and again, while it serves: jobs of their own, beside its replicas.

Runs in the driver. What was measured, and when, is in the store, so that an endpoint that starts anew goes on with the
schedule. What got worse is logged here, and told by the gateway's metrics.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from lmray.context import Result
from lmray.errors import LmrayError
from lmray.evaluate.recheck import is_due
from lmray.job import ScheduledEvaluation, ServeJob
from lmray.on_ray.evaluate import evaluate

LOOK_S = 10.0
"""How often is looked whether one is due."""
RETRY_S = 3600.0
"""After so long at most one that could not be made is tried again."""
_LOG = logging.getLogger(__name__)


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
        self._rests: dict[str, float] = {}
        """Name of an evaluation that could not be made -> when it is tried again."""

    def start(self) -> None:
        """Does nothing where it has been started."""
        if not self._thread.is_alive():
            self._thread.start()

    def join(self) -> None:
        """Returns once none runs any more. One that was given up goes on when the endpoint is started again."""
        if self._thread.is_alive():
            self._thread.join()

    def look(self) -> None:
        """Makes those that are due, one after another."""
        for one in self._serving().evaluations:
            if not self._ends.is_set() and self._clock() >= self._rests.get(one.job.name, 0.0):
                self._make(one)

    def _work(self) -> None:
        while not self._ends.wait(LOOK_S):
            self.look()

    def _make(self, one: ScheduledEvaluation) -> None:
        job, every_s = one.job, 3600 * one.every_hours
        try:
            if not is_due(job, every_s=every_s, now=self._clock()):
                return
            result = self._run(job, progress=False, ended=self._ends.is_set)
            for worse in result.details.get("worse", ()):
                _LOG.warning("evaluation `%s`: %s", job.name, worse)
        except Exception as error:  # whatever it is, the endpoint goes on and so does this thread
            self._rests[job.name] = self._clock() + min(every_s, RETRY_S)
            told = error if isinstance(error, LmrayError) else repr(error)
            _LOG.warning("evaluation `%s` could not be made: %s", job.name, told)
