"""Baselines, windows and alerts of an endpoint's versions, over scores that no model gave."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import threading

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from lmray.artifacts.file_store import FileStore
from lmray.config.monitor import Monitor
from lmray.errors import DataError
from lmray.policies.drift import compare
from lmray.serve import drift as module
from lmray.serve.drift import Drift
from tests.unit.serve.test_envelope import metrics as samples_of

WINDOW = 30
ONE, TWO = "helper@aaaaaaaaaaaa", "helper@bbbbbbbbbbbb"


@pytest.fixture
def store(tmp_path) -> FileStore:
    return FileStore(tmp_path)


def drift_of(store: FileStore, **settings) -> Drift:
    return Drift(store, "endpoint", Monitor(sample_fraction=1.0, window=WINDOW, **settings))


def feed(drift: Drift, version: str, count: int, *, shift: float = 0.0, seed: int = 0) -> None:
    source = random.Random(seed)

    async def main():
        for _ in range(count):
            scores = {"length": source.gauss(50, 5) + shift, "refusal": 0.0, "log_perplexity": source.gauss(2, 0.3)}
            await drift.add(version, scores)

    asyncio.run(main())


def outcome(drift: Drift, version: str = ONE) -> str:
    return {one["version"]: one["outcome"] for one in drift.report()}[version]


def events(store: FileStore) -> list[dict]:
    return [json.loads(store.get(key) or b"") for key in store.list("endpoints/endpoint/events")]


def test_first_answers_are_the_baseline_and_windows_after_it_are_compared(store, caplog):
    drift = drift_of(store)
    feed(drift, ONE, WINDOW)
    assert outcome(drift) == "learning"
    feed(drift, ONE, WINDOW - 1, shift=50.0)
    assert outcome(drift) == "learning", "no window is full"
    feed(drift, ONE, 1, shift=50.0)
    assert outcome(drift) == "alert"
    [told] = drift.report()
    assert (told["answers"], told["alerts"], told["baseline"], told["window"]) == (2 * WINDOW, 1, WINDOW, 0)
    assert told["measures"]["length"]["distance"] > 1 > told["measures"]["log_perplexity"]["distance"]
    assert told["measures"]["length"]["now"] > told["measures"]["length"]["before"] + 40
    warned = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert len(warned) == 1 and f"answers of `{ONE}` are not what they were: length " in warned[0]


def test_an_alert_is_one_event_until_the_answers_are_again_what_they_were(store):
    drift = drift_of(store)
    feed(drift, ONE, WINDOW)
    feed(drift, ONE, 2 * WINDOW, shift=50.0, seed=1)
    assert (outcome(drift), drift.report()[0]["alerts"]) == ("alert", 2)
    [event] = events(store)
    assert (event["event"], event["version"], event["outcome"]) == ("drift", ONE, "alert")
    assert event["measures"]["length"]["distance"] > 1
    feed(drift, ONE, WINDOW, seed=2)
    assert outcome(drift) == "ok"
    assert [event["outcome"] for event in events(store)] == ["alert", "ok"]


def test_answers_that_stay_what_they_were_raise_no_alert(store):
    drift = drift_of(store)
    for seed in range(40):
        feed(drift, ONE, WINDOW, seed=seed)
    assert outcome(drift) == "ok" and drift.report()[0]["alerts"] == 0 and events(store) == []


def test_a_comparison_that_takes_long_keeps_nobody_waiting(store, monkeypatch):
    drift, entered, opened = drift_of(store), threading.Event(), threading.Event()
    feed(drift, ONE, 2 * WINDOW - 1)

    def held(*values, **settings):
        entered.set()
        assert opened.wait(60)
        return compare(*values, **settings)

    monkeypatch.setattr(module, "compare", held)

    async def main():
        comparing = asyncio.ensure_future(drift.add(ONE, {"length": 50.0}))
        await asyncio.to_thread(entered.wait)
        assert not comparing.done()
        opened.set()
        await comparing

    asyncio.run(main())
    assert outcome(drift) == "ok"


def test_a_baseline_outlives_the_gateway(store):
    feed(drift_of(store), ONE, WINDOW)
    again = drift_of(store)
    feed(again, ONE, WINDOW, shift=50.0)
    assert outcome(again) == "alert"


def test_versions_are_compared_with_themselves_or_with_the_adapters_first_one(store):
    own = drift_of(store)
    feed(own, ONE, 2 * WINDOW)
    feed(own, TWO, 2 * WINDOW, shift=50.0)
    assert (outcome(own, ONE), outcome(own, TWO)) == ("ok", "ok")
    shared = drift_of(store, baseline="adapter")
    feed(shared, ONE, 2 * WINDOW)
    feed(shared, TWO, WINDOW, shift=50.0)
    assert (outcome(shared, ONE), outcome(shared, TWO)) == ("ok", "alert")


def test_a_reset_learns_the_baseline_anew_also_after_a_restart(store):
    drift = drift_of(store)
    feed(drift, ONE, WINDOW)
    feed(drift, ONE, WINDOW, shift=50.0)
    asyncio.run(drift.reset(ONE))
    assert outcome(drift) == "learning" and drift.report()[0]["baseline"] == 0
    restarted = drift_of(store)
    for one in (drift, restarted):
        feed(one, ONE, 2 * WINDOW, shift=50.0)
        assert outcome(one) == "ok"


def test_an_unknown_version_cannot_be_reset(store):
    drift = drift_of(store)
    with pytest.raises(DataError, match="is not watched") as caught:
        asyncio.run(drift.reset(ONE))
    assert "none has been answered yet" in str(caught.value)
    feed(drift, ONE, 1)
    with pytest.raises(DataError, match="did you mean"):
        asyncio.run(drift.reset(ONE[:-1] + "b"))


@pytest.mark.parametrize("spoilt", [b"{", b"[1]", b'{"values": {"length": "x"}}', b'{"values": 3}'])
def test_a_spoilt_baseline_is_learnt_anew_and_said_so(store, caplog, spoilt):
    store.put(f"endpoints/endpoint/drift/{ONE}.json", spoilt)
    drift = drift_of(store)
    feed(drift, ONE, WINDOW)
    assert "is no baseline; it is learnt anew" in caplog.text
    assert json.loads(store.get(f"endpoints/endpoint/drift/{ONE}.json") or b"")["count"] == WINDOW


def test_a_measure_that_some_answers_lack_is_compared_over_the_others(store):
    drift = drift_of(store)

    async def main():
        for place in range(2 * WINDOW):
            late = place >= WINDOW
            whole = {"length": 90.0 if late else 10.0 + place % 3} if place % 2 else {}
            await drift.add(ONE, {**whole, "refusal": 0.0})

    asyncio.run(main())
    [told] = drift.report()
    assert told["measures"]["length"]["distance"] > 1 and "log_perplexity" not in told["measures"]


def test_memory_and_metrics_are_bounded_and_alerts_come_first(store, monkeypatch):
    monkeypatch.setattr(module, "MAX_VERSIONS", 8)
    monkeypatch.setattr(module, "MAX_SHOWN", 3)
    drift = drift_of(store)
    feed(drift, ONE, WINDOW)
    feed(drift, ONE, WINDOW, shift=50.0)
    for place in range(7):
        feed(drift, f"a{place}@cccccccccccc", 3 * WINDOW)
    registry = CollectorRegistry()
    registry.register(drift)
    found = samples_of(generate_latest(registry).decode())
    assert len(drift.report()) == 8 == len(drift._baselines)
    assert found['lmray_serve_drift_alert{model="helper",version="aaaaaaaaaaaa"}'] == 1
    assert found['lmray_serve_drift_alerts_total{model="helper",version="aaaaaaaaaaaa"}'] == 1
    assert found['lmray_serve_drift_distance{measure="length",model="helper",version="aaaaaaaaaaaa"}'] > 1
    assert sum(name.startswith("lmray_serve_drift_answers_total") for name in found) == 3
    feed(drift, "b@cccccccccccc", 1)
    assert len(drift.report()) == 8
