"""What is known of the answers of each version of an endpoint: baselines, windows, and what came of comparing them.

Numbers only. A version's first answers, kept in the store, are the baseline; after them every full window is compared
with it (`lmray.policies.drift`) and a new one begins. A change of the outcome is logged and kept as an event of the
endpoint. Runs in the gateway.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lmray.artifacts.store import Store
from lmray.config.monitor import Monitor
from lmray.errors import DataError, did_you_mean
from lmray.metrics.names import SERVE
from lmray.policies.drift import Difference, compare

T = TypeVar("T")
MAX_VERSIONS = 1000
"""Versions that are watched at a time; those not answered for longest are forgotten, but for their baselines."""
MAX_SHOWN = 50
"""Versions that metrics tell of, those with alerts first."""
_LOG = logging.getLogger(__name__)
Outcome = Literal["learning", "ok", "alert"]


@dataclass
class Scored:
    """Scores of some answers: by measure, those that have it."""

    count: int = 0
    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, scores: Mapping[str, float]) -> None:
        self.count += 1
        for name, value in scores.items():
            self.values.setdefault(name, []).append(value)


@dataclass
class Watched:
    """One version."""

    baseline: Scored
    window: Scored = field(default_factory=Scored)
    answers: int = 0
    alerts: int = 0
    outcome: Outcome = "learning"
    differences: dict[str, Difference] = field(default_factory=dict)
    """Of the last full window."""


class Drift(Collector):
    """All versions of one endpoint, by `NAME@VERSION`."""

    def __init__(self, store: Store, endpoint: str, settings: Monitor):
        self._store, self._settings = store, settings
        self._folder = f"endpoints/{endpoint}"
        self._versions: OrderedDict[str, Watched] = OrderedDict()
        self._baselines: OrderedDict[str, Scored] = OrderedDict()
        self._turn = asyncio.Lock()  # what is written last is what is known
        self.missed = 0
        """Sampled answers that nobody had time to score."""

    async def add(self, version: str, scores: Mapping[str, float]) -> None:
        """Takes an answer's scores by measure; compares where a window is full. Raises OSError where the store cannot
        be written to."""
        async with self._turn:
            await self._add(version, scores)

    async def reset(self, version: str) -> None:
        """The baseline of `version` is learnt anew from its next answers. Raises DataError for an unknown one."""
        if version not in self._versions:
            hint = did_you_mean(version, self._versions)
            allowed = ", ".join(self._versions) or "none has been answered yet"
            raise DataError(f"version `{version}`", "is not watched", allowed=allowed, hint=hint)
        async with self._turn:
            baseline = self._versions[version].baseline
            baseline.count, baseline.values = 0, {}
            for watched in self._versions.values():
                if watched.baseline is baseline:
                    watched.window, watched.outcome, watched.differences = Scored(), "learning", {}
            await self._write(self._key(version), asdict(baseline))

    def report(self) -> list[dict[str, Any]]:
        """Every version that is watched; JSON types."""
        return [
            {
                "version": version,
                "outcome": watched.outcome,
                "answers": watched.answers,
                "alerts": watched.alerts,
                "baseline": watched.baseline.count,
                "window": watched.window.count,
                "measures": {name: asdict(one) for name, one in watched.differences.items()},
            }
            for version, watched in sorted(self._versions.items())
        ]

    def collect(self) -> Iterator[Metric]:
        """The same for Prometheus, of at most MAX_SHOWN versions. Another thread may call it."""
        ranked = sorted(self._versions.items(), key=lambda one: (one[1].outcome != "alert", -one[1].answers))
        shown = [(version.partition("@")[::2], watched) for version, watched in ranked[:MAX_SHOWN]]
        yield _family("lmray_serve_drift_answers_total", [(names, one.answers) for names, one in shown])
        yield _family("lmray_serve_drift_alerts_total", [(names, one.alerts) for names, one in shown])
        yield _family("lmray_serve_drift_alert", [(names, one.outcome == "alert") for names, one in shown])
        distances = [
            ((*names, measure), difference.distance)
            for names, one in shown
            for measure, difference in one.differences.items()
        ]
        yield _family("lmray_serve_drift_distance", distances, ("model", "version", "measure"))
        yield _family("lmray_serve_drift_missed_total", [((), self.missed)], ())

    async def _add(self, version: str, scores: Mapping[str, float]) -> None:
        watched = self._versions.get(version) or Watched(await self._baseline(version))
        _remember(self._versions, version, watched)
        watched.answers += 1
        if watched.baseline.count < self._settings.window:
            watched.baseline.add(scores)
            if watched.baseline.count == self._settings.window:
                await self._write(self._key(version), asdict(watched.baseline))
            return
        watched.window.add(scores)
        if watched.window.count >= self._settings.window:
            await self._judge(version, watched)

    async def _judge(self, version: str, watched: Watched) -> None:
        """Compares a full window, and begins the next."""
        window, watched.window = watched.window, Scored()
        told = partial(compare, watched.baseline.values, window.values, false_alarms=self._settings.false_alarms)
        found = await asyncio.to_thread(told)  # of large windows that takes a while
        drifted = {name: one for name, one in found.items() if one.drifted}
        before, watched.outcome = watched.outcome, "alert" if drifted else "ok"
        watched.differences = found
        watched.alerts += bool(drifted)
        if drifted and before != "alert":
            told = "; ".join(f"{name} {one.before:.4g} -> {one.now:.4g}" for name, one in drifted.items())
            _LOG.warning("answers of `%s` are not what they were: %s", version, told)
        elif before == "alert" and not drifted:
            _LOG.warning("answers of `%s` are again what they were", version)
        else:
            return
        event = {"event": "drift", "version": version, "outcome": watched.outcome, "answers": watched.answers}
        measures = {name: asdict(one) for name, one in found.items()}
        name = f"{self._folder}/events/{time.time_ns()}-drift.json"
        await self._write(name, {**event, "measures": measures, "time": round(time.time(), 3)})

    async def _baseline(self, version: str) -> Scored:
        """What `version` is compared with: in memory, in the store, or to be learnt."""
        key = self._key(version)
        if key not in self._baselines:
            document = await asyncio.to_thread(self._store.get, key)
            _remember(self._baselines, key, self._decode(key, document))
        return self._baselines[key]

    def _key(self, version: str) -> str:
        compared = version if self._settings.baseline == "version" else version.partition("@")[0]
        return f"{self._folder}/drift/{compared}.json"

    def _decode(self, key: str, document: bytes | None) -> Scored:
        try:
            told = json.loads(document or b"{}")
            values = {str(name): [float(value) for value in found] for name, found in told.get("values", {}).items()}
            return Scored(int(told.get("count", 0)), values)
        except (ValueError, TypeError, AttributeError):
            _LOG.warning("%s/%s is no baseline; it is learnt anew", self._store.root, key)
            return Scored()

    async def _write(self, key: str, value: Any) -> None:
        await asyncio.to_thread(self._store.put, key, (json.dumps(value) + "\n").encode())


def _remember(known: OrderedDict[str, T], key: str, value: T) -> None:
    known[key] = value
    known.move_to_end(key)
    if len(known) > MAX_VERSIONS:
        known.popitem(last=False)


def _family(
    name: str, values: list[tuple[tuple[str, ...], float]], labels: tuple[str, ...] = ("model", "version")
) -> Metric:
    kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    family = kind(name, SERVE[name].help, labels=labels)
    for names, value in values:
        family.add_metric(names, value)
    return family
