"""What scheduled evaluations found of what an endpoint has in production, as Prometheus reads it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lmray.artifacts.evaluations import Evaluation
from lmray.errors import LmrayError
from lmray.evaluate.recheck import last_evaluations
from lmray.job import EvaluateJob
from lmray.metrics.names import SERVE, metric

READ_S = 30.0
"""Records are read again after so long."""
_LOG = logging.getLogger(__name__)


class Evaluated(Collector):
    """Of the versions that `jobs`, which name their store, would measure now."""

    def __init__(self, jobs: Sequence[EvaluateJob], *, clock: Callable[[], float] = time.monotonic):
        self._jobs, self._clock = jobs, clock
        self._read_s = -READ_S
        self._last: dict[str, dict[str, Evaluation]] = {}
        """Name of a job -> version -> what was found last."""
        self._said: dict[str, str] = {}
        """Name of a job -> why nothing new is told of it."""

    async def look(self) -> None:
        """What the page tells next."""
        if self._jobs and self._clock() - self._read_s >= READ_S:
            self._read_s = self._clock()
            await asyncio.to_thread(self._read)

    def collect(self) -> Iterator[Metric]:
        labels = ("model", "version", "evaluation")
        worse = _family("lmray_serve_evaluation_worse", *labels)
        made = _family("lmray_serve_evaluation_time", *labels)
        scores = _family("lmray_serve_evaluation_score", *labels, "measure")
        for job, versions in self._last.items():
            for version, one in versions.items():
                values = (*version.partition("@")[::2], job)
                worse.add_metric(values, len(one.worse))
                made.add_metric(values, one.time)
                for measure, value in one.metrics.items():
                    if _can_be_worse(measure):
                        scores.add_metric((*values, measure), value)
        yield from (worse, made, scores)

    def _read(self) -> None:
        """Of a job whose records cannot be read, what was told before stays."""
        last, said = dict(self._last), {}
        for job in self._jobs:
            try:
                last[job.name] = {version: one for version, one in last_evaluations(job).items() if one is not None}
            except (LmrayError, OSError) as error:
                said[job.name] = str(error)
                if said[job.name] != self._said.get(job.name):
                    _LOG.warning("evaluation `%s` cannot be told: %s", job.name, error)
        self._last, self._said = last, said


def _can_be_worse(measure: str) -> bool:
    """Not of one that an earlier lmray named otherwise."""
    try:
        return bool(metric(measure).better)
    except KeyError:
        return False


def _family(name: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, SERVE[name].help, labels=labels)
