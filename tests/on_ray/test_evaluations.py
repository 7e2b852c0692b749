"""When an endpoint's scheduled evaluations are made; that they are made on Ray is in test_serve."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from lmray.artifacts.evaluations import Evaluation, Evaluations
from lmray.artifacts.store import open_store
from lmray.context import Result
from lmray.errors import ConfigError, LmrayError, RemoteError
from lmray.evaluate.recheck import _asked, versions
from lmray.job import EvaluateJob, ServeJob
from lmray.on_ray import evaluations as module
from lmray.on_ray.evaluations import RETRY_S, Evaluator
from lmray.on_ray.portable import portable
from lmray.serve.prepare import prepare
from lmray.testing.waiting import wait_until
from tests.on_ray.endpoints import keep_version, make_job

HOUR_S = 3600.0


def asks(rows: str, name: str = "nightly", **changes: Any) -> dict[str, Any]:
    """An evaluation of what `adapter-0` has in production."""
    job = {
        "name": name,
        "model": {"source": "", "dtype": "float32"},
        "data": {"train": [{"source": rows}], "eval": {"split": 0.25}, "max_length": 256},
        "targets": [{"label": "production", "adapter": "adapter-0@production"}],
        "evaluate": {"tasks": ["loss"], "base": False},
        "tolerances": {"eval.loss": 0.1},
    }
    return {"job": job | changes, "every_hours": 24}


@pytest.fixture
def serving(tmp_path, tiny_data):
    """An endpoint's job with these evaluations."""

    def make(*names: str, **changes: Any) -> ServeJob:
        job = make_job(tmp_path, ("adapter-0",))
        told = [asks(str(tiny_data), name, **changes) for name in names]
        for one in told:
            one["job"]["model"]["source"] = job.model.source
        return job.changed({"monitor.evaluations": told})

    return make


class Runs:
    """Evaluations that measure nothing, and are kept as if they had; of a version that is in `worse` it got worse."""

    def __init__(self) -> None:
        self.jobs: list[EvaluateJob] = []
        self.fails: Exception | None = None
        self.worse: list[str] = []

    def __call__(self, job: EvaluateJob, *, progress: bool, ended: Any) -> Result:
        assert not progress and not ended()
        self.jobs.append(job)
        if self.fails is not None:
            raise self.fails
        for version in versions(job).values():
            Evaluations(open_store(job.storage)).add(Evaluation(version, _asked(job), {"eval.loss": 1.0}, job.name))
        return Result("failed" if self.worse else "succeeded", run=job.name, details={"worse": self.worse})

    @property
    def names(self) -> list[str]:
        return [job.name for job in self.jobs]


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """The time, to be set."""
    found = [1_000_000.0]
    monkeypatch.setattr("lmray.artifacts.evaluations.time.time", lambda: found[0])
    return found


def evaluator(job: ServeJob, runs: Runs, now: list[float]) -> Evaluator:
    return Evaluator(lambda: job, threading.Event(), run=runs, clock=lambda: now[0])


def test_each_is_made_once_a_day_and_at_once_for_a_version_it_has_not_measured(serving, now, tmp_path):
    runs, job = Runs(), serving("nightly", "weekly", evaluate={"tasks": ["loss", "f1"], "base": False})
    one = evaluator(job, runs, now)
    one.look()
    assert runs.names == ["nightly"], "the other would measure the same"
    now[0] += 23.9 * HOUR_S
    one.look()
    evaluator(job, runs, now).look()  # of an endpoint that started anew
    assert len(runs.names) == 1
    now[0] += 0.1 * HOUR_S
    one.look()
    assert len(runs.names) == 2
    keep_version(tmp_path, "adapter-0", seed=9)
    one.look()
    one.look()
    assert len(runs.names) == 3
    (made,) = {(job.storage, job.resources.cpus_per_worker) for job in runs.jobs}
    assert made == (str(tmp_path / "store"), 1), "in the endpoint's store, on one core"


def test_what_got_worse_is_said(serving, now, caplog):
    runs = Runs()
    runs.worse = ["adapter-0@1: eval.loss is 3, was 2"]
    evaluator(serving("nightly"), runs, now).look()
    assert [one.getMessage() for one in caplog.records] == ["evaluation `nightly`: adapter-0@1: eval.loss is 3, was 2"]


@pytest.mark.parametrize("error", [RemoteError("cluster", "a node is lost"), ZeroDivisionError("a mistake")])
def test_one_that_cannot_be_made_is_said_and_tried_again_later_and_the_others_are_made(serving, now, caplog, error):
    runs, job = Runs(), serving("first", "second")
    job = job.changed({"monitor.evaluations.1.job.evaluate.tasks": ["f1", "loss"]})
    one = evaluator(job, runs, now)
    runs.fails = error
    one.look()
    assert runs.names == ["first", "second"]
    assert "`first` could not be made" in caplog.text and str(error.args[-1]) in caplog.text
    runs.fails = None
    one.look()
    assert len(runs.names) == 2
    now[0] += RETRY_S
    one.look()
    assert runs.names == ["first", "second"] * 2


def test_it_looks_until_the_endpoint_stops(serving, now, monkeypatch):
    monkeypatch.setattr(module, "LOOK_S", 0.001)
    runs, ends, job = Runs(), threading.Event(), serving("nightly")
    one = Evaluator(lambda: job, ends, run=runs, clock=lambda: now[0])
    one.start()
    one.start()
    wait_until(lambda: runs.names, "a first one")
    ends.set()
    one.join()
    now[0] += 25 * HOUR_S
    one.look()
    assert runs.names == ["nightly"]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"tolerances": {}}, "says nothing of what is worse"),
        ({"tolerances": {"eval.los": 0.1}}, "is no metric"),
        ({"targets": [{"label": "base"}]}, "no target is an artifact"),
        ({"targets": [{"label": "gone", "adapter": "gone@production"}]}, r"evaluations\.0\.job: .*gone"),
        ({"data": {"train": [{"source": "/nowhere.jsonl"}], "eval": {"split": 0.5}}}, r"evaluations\.0\.job: "),
    ],
    ids=str,
)
def test_what_could_not_be_evaluated_is_refused_before_the_endpoint_starts(serving, changes, found):
    with pytest.raises(LmrayError, match=found):
        prepare(serving("nightly", **changes))
    prepare(serving("nightly"))


def test_two_of_one_name_are_refused(serving):
    with pytest.raises(ConfigError, match="two evaluations are named `nightly`"):
        serving("nightly", "nightly")


def test_relative_paths_of_a_submitted_endpoints_evaluations_become_absolute(serving, tmp_path, tiny_data):
    job = serving("nightly").changed({"monitor.evaluations.0.job.data.train.0.source": tiny_data.name})
    moved = portable(job, folder=tiny_data.parent)
    assert moved.monitor.evaluations[0].job.data.train[0].source == str(tiny_data)
    with pytest.raises(ConfigError, match=r"monitor\.evaluations\.0\.job\.data\.train\.0\.source"):
        portable(job, folder=tmp_path / "elsewhere")
