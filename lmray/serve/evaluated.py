"""What scheduled evaluations found of what an endpoint has in production, as Prometheus reads it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lmray.errors import LmrayError
from lmray.evaluate.recheck import Standing, standings
from lmray.job import ScheduledEvaluation
from lmray.metrics.names import SERVE, metric

READ_S = 30.0
"""Records are read again after so long."""
_LOG = logging.getLogger(__name__)


class Evaluated(Collector):
    """Of the versions that `scheduled` evaluations, whose jobs name their store, would measure now."""

    def __init__(self, scheduled: Sequence[ScheduledEvaluation], *, clock: Callable[[], float] = time.time):
        self._scheduled, self._clock = scheduled, clock
        self._read_s = -READ_S
        self._found: dict[str, list[Standing]] = {}
        """By the name of a job."""
        self._said: dict[str, str] = {}
        """Name of a job -> why nothing new is told of it."""

    async def look(self) -> None:
        """What the page tells next."""
        if self._scheduled and abs(self._clock() - self._read_s) >= READ_S:
            self._read_s = self._clock()
            await asyncio.to_thread(self._read)

    def collect(self) -> Iterator[Metric]:
        labels = ("model", "version", "evaluation", "target")
        due = _family("lmray_serve_evaluation_due", *labels)
        worse = _family("lmray_serve_evaluation_worse", *labels)
        scores = _family("lmray_serve_evaluation_score", *labels, "measure")
        for one in self._scheduled:
            for found in self._found.get(one.job.name, ()):
                values = (*found.version.partition("@")[::2], one.job.name, found.label)
                due.add_metric(values, found.is_due(every_s=3600 * one.every_hours, now=self._clock()))
                if found.last is not None:
                    worse.add_metric(values, len(found.last.worse))
                    for measure, value in found.last.metrics.items():
                        if _can_be_worse(measure):
                            scores.add_metric((*values, measure), value)
        yield from (due, worse, scores)

    def _read(self) -> None:
        """Of a job whose records cannot be read, what was told before stays."""
        found, said = dict(self._found), {}
        for job in [one.job for one in self._scheduled]:
            try:
                found[job.name] = standings(job, now=self._clock())
            except (LmrayError, OSError) as error:
                said[job.name] = str(error)
                if said[job.name] != self._said.get(job.name):
                    _LOG.warning("evaluation `%s` cannot be told: %s", job.name, error)
        self._found, self._said = found, said


def _can_be_worse(measure: str) -> bool:
    """Not of one that an earlier lmray named otherwise."""
    try:
        return bool(metric(measure).better)
    except KeyError:
        return False


def _family(name: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, SERVE[name].help, labels=labels)
