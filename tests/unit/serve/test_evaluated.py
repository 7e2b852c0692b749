"""What the gateway's page tells of scheduled evaluations."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from lmray.evaluate.recheck import recheck, versions
from lmray.job import EvaluateJob, ScheduledEvaluation
from lmray.serve.evaluated import READ_S, Evaluated
from tests.unit.serve.stores import SmallStore

WORSE, DUE = "lmray_serve_evaluation_worse", "lmray_serve_evaluation_due"


@pytest.fixture
def small(tmp_path) -> SmallStore:
    return SmallStore(tmp_path)


@pytest.fixture
def job(small):
    def make(*adapters: str, name: str = "nightly", tasks: tuple[str, ...] = ()) -> EvaluateJob:
        targets = [{"label": one.replace("@", "-"), "adapter": one} for one in adapters]
        told = {"model": {"source": "tiny"}, "targets": targets, "evaluate": {"tasks": tasks, "base": False}}
        told |= {"tolerances": {"eval.loss": 0.1}, "storage": str(small.store.root)}
        told |= {"data": {"train": [{"source": "rows.jsonl"}], "eval": {"split": 0.5}}}
        return EvaluateJob.model_validate({"name": name, **told})

    return make


def measure(job: EvaluateJob, *losses: float) -> None:
    """Keeps an evaluation of each target of `job`."""
    metrics = [{"eval.loss": loss, "eval.samples": 7.0, "eval.of_old": 7.0} for loss in losses]
    recheck(job, dict(zip([one.label for one in job.targets], metrics, strict=True)), versions(job), run="run")


def page(evaluated: Evaluated) -> CollectorRegistry:
    asyncio.run(evaluated.look())
    registry = CollectorRegistry()
    registry.register(evaluated)
    return registry


def label(version: str, evaluation: str = "nightly", target: str = "helper-production", **more: str) -> dict[str, str]:
    name, _, number = version.partition("@")
    return {"model": name, "version": number, "evaluation": evaluation, "target": target, **more}


def watched(*jobs: EvaluateJob, **told: Any) -> Evaluated:
    scheduled = [ScheduledEvaluation(job=job.model_copy(update={"storage": None})) for job in jobs]
    return Evaluated([one.at(job.storage) for one, job in zip(scheduled, jobs, strict=True)], **told)


def test_what_is_in_production_is_told_and_after_a_rollback_that(small, job):
    one = job("helper@production")
    first = small.keep("helper", "1", stage="production").ref
    measure(one, 1.0)
    second = small.keep("helper", "2", stage="production").ref
    measure(one, 3.0)
    found = page(watched(one))
    assert found.get_sample_value(WORSE, label(second)) == 1
    assert found.get_sample_value("lmray_serve_evaluation_score", label(second, measure="eval.loss")) == 3.0
    assert found.get_sample_value(DUE, label(second)) == 0
    told = [sample for metric in found.collect() for sample in metric.samples]
    assert len(told) == 3, "neither of what was before, nor what is better neither way"
    small.artifacts.promote(first, "production")
    found = page(watched(one))
    assert found.get_sample_value(WORSE, label(first)) == 0 and found.get_sample_value(WORSE, label(second)) is None


def test_two_stages_of_one_artifact_and_two_evaluations_of_one_version_are_told(small, job):
    both, other = job("helper@production", "helper@staging"), job("helper@production", name="f1", tasks=("f1",))
    first = small.keep("helper", "1", stage="production").ref
    second = small.keep("helper", "2", stage="staging").ref
    measure(job("helper@production"), 1.0)
    measure(both, 1.0, 3.0)
    measure(other, 5.0)
    found = page(watched(both, other))
    assert found.get_sample_value(WORSE, label(first)) == 0
    assert found.get_sample_value(WORSE, label(second, target="helper-staging")) == 1
    loss = label(first, "f1", measure="eval.loss")
    assert found.get_sample_value("lmray_serve_evaluation_score", loss) == 5.0


def test_two_targets_of_one_version_are_compared_with_what_was_before_and_both_told(small, job):
    both = job("helper@production", "helper@staging")
    small.keep("helper", "1", stage="production")
    measure(job("helper@production"), 1.0)
    version = small.keep("helper", "2", stage="production").ref
    small.artifacts.promote(version, "staging")
    measure(both, 3.0, 3.0)
    found = page(watched(both))
    targets = [label(version, target=f"helper-{stage}") for stage in ("production", "staging")]
    assert [found.get_sample_value(WORSE, one) for one in targets] == [1, 1]


def test_a_version_that_was_not_measured_and_one_whose_time_has_come_are_due(small, job):
    now, one = [time.time()], job("helper@production")
    evaluated, version = watched(one, clock=lambda: now[0]), small.keep("helper", stage="production").ref
    found = page(evaluated)
    assert (found.get_sample_value(DUE, label(version)), found.get_sample_value(WORSE, label(version))) == (1, None)
    measure(one, 1.0)
    now[0] += READ_S
    assert page(evaluated).get_sample_value(DUE, label(version)) == 0
    now[0] += 86400
    assert page(evaluated).get_sample_value(DUE, label(version)) == 1


def test_records_are_read_now_and_then(small, job):
    now, one = [time.time()], job("helper@production")
    version = small.keep("helper", stage="production").ref
    evaluated = watched(one, clock=lambda: now[0])
    assert page(evaluated).get_sample_value(WORSE, label(version)) is None
    measure(one, 1.0)
    now[0] += READ_S - 1
    assert page(evaluated).get_sample_value(WORSE, label(version)) is None
    now[0] += 1
    assert page(evaluated).get_sample_value(WORSE, label(version)) == 0


def test_what_cannot_be_read_is_said_once_and_what_was_told_stays(small, job, caplog):
    now, one, other = [time.time()], job("helper@production"), job("gone@production", name="other")
    version = small.keep("helper", stage="production").ref
    measure(one, 1.0)
    evaluated = watched(other, one, clock=lambda: now[0])
    assert page(evaluated).get_sample_value(WORSE, label(version)) == 0
    small.store.put("artifacts/helper/evaluations/9.json", b"{")
    for _ in range(2):
        now[0] += READ_S
        assert page(evaluated).get_sample_value(WORSE, label(version)) == 0
    said = [record.getMessage().partition(":")[0] for record in caplog.records]
    assert said == ["evaluation `other` cannot be told", "evaluation `nightly` cannot be told"]
