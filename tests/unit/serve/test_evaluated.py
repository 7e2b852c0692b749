"""What the gateway's page tells of scheduled evaluations."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from lmray.artifacts.evaluations import Evaluation, Evaluations
from lmray.artifacts.file_store import FileStore
from lmray.job import EvaluateJob
from lmray.serve.evaluated import READ_S, Evaluated

LABELS = {"model": "helper", "evaluation": "nightly"}


@pytest.fixture
def store(tmp_path) -> FileStore:
    return FileStore(tmp_path)


def job(name: str = "nightly", **target: str) -> EvaluateJob:
    told = {"model": {"source": "tiny"}, "targets": [{"label": "one", **target}], "evaluate": {"tasks": []}}
    return EvaluateJob.model_validate({"name": name, **told})


def keep(store: FileStore, version: str, loss: float, *, run: str = "nightly", worse: bool = False) -> None:
    metrics = {"eval.loss": loss, "eval.samples": 7.0, "eval.of_old": 7.0}
    was = {"eval.loss": 1.0} if worse else {}
    Evaluations(store).add(Evaluation(version, "asked", metrics, f"/store/runs/{run}", was))


def page(evaluated: Evaluated) -> CollectorRegistry:
    asyncio.run(evaluated.look())
    registry = CollectorRegistry()
    registry.register(evaluated)
    return registry


def test_the_last_evaluation_of_each_run_is_told(store):
    keep(store, "helper@1", 1.0)
    keep(store, "helper@2", 3.0, worse=True)
    keep(store, "helper@2", 5.0, run="somebody-elses")
    keep(store, "other@1", 5.0)
    found = page(Evaluated(store, [job(adapter="helper@production")]))
    told = [one for metric in found.collect() for one in metric.samples]
    assert found.get_sample_value("lmray_serve_evaluation_worse", {**LABELS, "version": "2"}) == 1
    loss = {**LABELS, "version": "2", "measure": "eval.loss"}
    assert found.get_sample_value("lmray_serve_evaluation_score", loss) == 3.0
    assert len(told) == 2, "neither of others, nor what is better neither way"


def test_records_are_read_now_and_then(store):
    now = [0.0]
    evaluated = Evaluated(store, [job(model="artifact:helper@production")], clock=lambda: now[0])
    name, labels = "lmray_serve_evaluation_worse", {**LABELS, "version": "1"}
    assert page(evaluated).get_sample_value(name, labels) is None
    keep(store, "helper@1", 1.0)
    now[0] = READ_S - 1
    assert page(evaluated).get_sample_value(name, labels) is None
    now[0] = READ_S
    assert page(evaluated).get_sample_value(name, labels) == 0


def test_a_spoilt_record_hides_no_other_artifact(store, caplog):
    keep(store, "helper@1", 1.0)
    store.put("artifacts/broken/evaluations/1.json", b"{")
    found = page(Evaluated(store, [job(adapter="broken"), job(adapter="helper")]))
    assert found.get_sample_value("lmray_serve_evaluation_worse", {**LABELS, "version": "1"}) == 0
    assert "`broken` cannot be told" in caplog.text
