"""What scheduled evaluations found last of each version of an endpoint, as Prometheus reads it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lmray.artifacts.evaluations import Evaluation, Evaluations
from lmray.artifacts.store import Store
from lmray.errors import LmrayError
from lmray.job import EvaluateJob, Target
from lmray.metrics.names import SERVE, metric
from lmray.models.source import ARTIFACT

READ_S = 30.0
"""Records are read again after so long."""
_LOG = logging.getLogger(__name__)


class Evaluated(Collector):
    """Of the artifacts that `jobs` measure."""

    def __init__(self, store: Store, jobs: Sequence[EvaluateJob], *, clock: Callable[[], float] = time.monotonic):
        self._runs = {job.name for job in jobs}
        self._names = sorted({name for job in jobs for target in job.targets if (name := _artifact(target))})
        self._evaluations, self._clock = Evaluations(store), clock
        self._read_s = -READ_S
        self._last: dict[tuple[str, str], Evaluation] = {}
        """Artifact and run -> the last evaluation there."""

    async def look(self) -> None:
        """What the page tells next."""
        if self._names and self._clock() - self._read_s >= READ_S:
            self._read_s = self._clock()
            self._last = await asyncio.to_thread(self._read)

    def collect(self) -> Iterator[Metric]:
        worse = _family("lmray_serve_evaluation_worse", "model", "version", "evaluation")
        scores = _family("lmray_serve_evaluation_score", "model", "version", "evaluation", "measure")
        for (name, run), one in self._last.items():
            labels = (name, one.version.partition("@")[2], run)
            worse.add_metric(labels, len(one.worse))
            for measure, value in one.metrics.items():
                if _can_be_worse(measure):
                    scores.add_metric((*labels, measure), value)
        yield worse
        yield scores

    def _read(self) -> dict[tuple[str, str], Evaluation]:
        found = {}
        for name in self._names:
            try:
                runs = [(Path(one.run).name, one) for one in self._evaluations.of(name)]
            except LmrayError as error:
                _LOG.warning("the evaluations of `%s` cannot be told: %s", name, error)
            else:
                found |= {(name, run): one for run, one in runs if run in self._runs}
        return found


def _artifact(target: Target) -> str:
    """Its name; that of a folder is of none."""
    return (target.adapter or target.model or "").removeprefix(ARTIFACT).partition("@")[0]


def _can_be_worse(measure: str) -> bool:
    """Not of one that an earlier lmray named otherwise."""
    try:
        return bool(metric(measure).better)
    except KeyError:
        return False


def _family(name: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, SERVE[name].help, labels=labels)
