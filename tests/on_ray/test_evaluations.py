"""When an endpoint's scheduled evaluations are made; that they are made on Ray is in test_serve."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import ray
from ray.exceptions import RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group

from lmray.config import dump
from lmray.context import Result
from lmray.errors import ArtifactError, ConfigError, LmrayError, RemoteError
from lmray.evaluate.recheck import recheck, versions
from lmray.job import EvaluateJob, ServeJob
from lmray.on_ray import evaluations as module
from lmray.on_ray.deployments import engine_version
from lmray.on_ray.evaluate import evaluate
from lmray.on_ray.evaluations import RETRY_S, Evaluator
from lmray.on_ray.portable import portable
from lmray.serve.prepare import check_evaluations, prepare
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
        self.keeps, self.waits = True, False
        self.worse: list[str] = []

    def __call__(self, job: EvaluateJob, *, progress: bool, reserves: bool, ended: Callable[[], bool]) -> Result:
        assert not progress and not reserves and not ended(), "replicas come first"
        waits = self.waits  # before the test hears of it
        self.jobs.append(job)
        if self.fails is not None:
            raise self.fails
        if waits:
            wait_until(ended, "the end")
            return Result("stopped", run=job.name)
        if self.keeps:
            recheck(job, {"production": {"eval.loss": 1.0}}, versions(job), run=job.name)
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


def as_ray_raises_it(error: Exception) -> Exception:
    told = f"Traceback, many lines\n{type(error).__name__}: {error}"
    return RayTaskError("_evaluate", told, error).as_instanceof_cause()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RemoteError("cluster", "a node is lost"), "cluster: a node is lost"),
        (as_ray_raises_it(ArtifactError("adapter", "is gone")), "adapter: is gone"),
        (ZeroDivisionError("a mistake"), "a mistake"),
        (as_ray_raises_it(OSError("disk full")), "OSError: disk full"),
    ],
    ids=str,
)
def test_one_that_cannot_be_made_is_said_and_tried_again_later_and_the_others_are_made(
    serving, now, caplog, error, said
):
    runs, job = Runs(), serving("first", "second")
    job = job.changed({"monitor.evaluations.1.job.evaluate.tasks": ["f1", "loss"]})
    one = evaluator(job, runs, now)
    runs.fails = error
    one.look()
    assert runs.names == ["first", "second"]
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"evaluation `{name}` could not be made: {said}" for name in ("first", "second")]
    runs.fails = None
    one.look()
    assert len(runs.names) == 2
    now[0] += RETRY_S
    one.look()
    assert runs.names == ["first", "second"] * 2


def test_a_store_that_is_away_for_a_moment_costs_no_hour(serving, now, caplog, monkeypatch):
    runs = Runs()
    one = evaluator(serving("nightly"), runs, now)

    def away(job):
        raise OSError("stale handle")

    with monkeypatch.context() as patch:
        patch.setattr(module, "versions", away)
        one.look()
        one.look()
    assert len(caplog.records) == 1 and not runs.names, "said once"
    one.look()
    assert runs.names == ["nightly"]


def test_another_version_or_another_job_does_not_wait_for_the_next_try(serving, now, tmp_path):
    runs, jobs = Runs(), [serving("nightly")]
    runs.fails = RemoteError("cluster", "a node is lost")
    one = Evaluator(lambda: jobs[0], threading.Event(), run=runs, clock=lambda: now[0])
    one.look()
    one.look()
    assert len(runs.names) == 1
    keep_version(tmp_path, "adapter-0", seed=9)
    one.look()
    assert len(runs.names) == 2
    jobs[0] = jobs[0].changed({"monitor.evaluations.0.job.tolerances": {"eval.loss": 0.5}})
    one.look()
    assert len(runs.names) == 3


def test_one_that_leaves_no_record_is_not_made_again_and_again(serving, now):
    runs = Runs()
    runs.keeps = False
    one = evaluator(serving("nightly"), runs, now)
    one.look()
    one.look()
    now[0] -= 10 * RETRY_S  # a clock that was wrong
    one.look()
    assert len(runs.names) == 2


def test_one_that_an_update_leaves_out_ends_and_its_successor_is_made(serving, now):
    runs, jobs = Runs(), [serving("nightly", "late")]
    runs.waits = True
    one = Evaluator(lambda: jobs[0], threading.Event(), run=runs, clock=lambda: now[0])
    looking = threading.Thread(target=one.look)
    looking.start()
    wait_until(lambda: runs.names, "the first")
    runs.waits = False
    jobs[0] = jobs[0].changed({"monitor.evaluations": dump(jobs[0])["monitor"]["evaluations"][1:]})
    looking.join()
    assert runs.names == ["nightly", "late"]


def test_one_that_finds_no_free_gpu_is_said_and_nothing_waits_for_it(serving, now, caplog, monkeypatch):
    monkeypatch.setattr(module.ray, "available_resources", lambda: {"CPU": 4.0, "GPU": 0.5})
    runs = Runs()
    job = serving("nightly").changed({"monitor.evaluations.0.job.resources.gpus_per_worker": 1})
    evaluator(job, runs, now).look()
    assert not runs.names and "resources.gpus_per_worker: 1 asked for, 0 free" in caplog.text


def test_one_that_has_ended_before_it_begins_starts_no_ray(serving, monkeypatch):
    monkeypatch.setattr("lmray.on_ray.evaluate.connected", lambda: pytest.fail("Ray started"))
    (one,) = serving("nightly").evaluations
    assert evaluate(one.job, progress=False, ended=lambda: True).status == "stopped"


def test_one_beside_replicas_needs_no_room(ray_cluster, serving):
    (one,) = serving("nightly").evaluations
    with occupied(cpus=4):
        assert evaluate(one.job, progress=False, reserves=False).status == "succeeded"


def test_one_that_ends_while_it_waits_for_room_is_cancelled(ray_cluster, serving, tmp_path):
    (one,) = serving("nightly").evaluations
    looks = iter((False, False, True))
    job = one.job.model_copy(update={"resources": one.job.resources.model_copy(update={"cpus_per_worker": 4})})
    with occupied(cpus=1):
        assert evaluate(job, progress=False, ended=lambda: next(looks)).status == "stopped"
    assert not (tmp_path / "store" / "runs" / "nightly" / "result.json").exists()


@contextmanager
def occupied(*, cpus: int) -> Iterator[None]:
    """So many of the cluster's CPUs are taken."""
    group = placement_group([{"CPU": cpus}])
    ray.get(group.ready())
    try:
        yield
    finally:
        remove_placement_group(group)


def test_it_looks_until_the_endpoint_stops(serving, now, monkeypatch):
    monkeypatch.setattr(module, "LOOK_S", 0.001)
    runs, ends, job = Runs(), threading.Event(), serving("nightly")
    one = Evaluator(lambda: job, ends, run=runs, clock=lambda: now[0])
    one.start()
    one.start()
    wait_until(lambda: runs.names, "a first one")
    ends.set()
    one.join(60)
    now[0] += 25 * HOUR_S
    one.look()
    assert runs.names == ["nightly"]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"tolerances": {}}, "says nothing of what is worse"),
        ({"storage": "elsewhere"}, "has a store of its own"),
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


def test_an_update_does_not_depend_on_the_data_of_evaluations_that_it_keeps(serving, tiny_data):
    job = serving("nightly")
    tiny_data.unlink()
    prepare(job, listens=True)
    check_evaluations(job, known=job.evaluations)
    with pytest.raises(LmrayError, match=r"evaluations\.0\.job: .*データ"):
        check_evaluations(job)


def test_they_replace_no_engine(serving):
    plain, job = serving(), serving("nightly")
    assert engine_version(plain, prepare(plain), 1) == engine_version(job, prepare(job), 1)


def test_two_of_one_name_are_refused(serving):
    with pytest.raises(ConfigError, match="two evaluations have the same name"):
        serving("nightly", "nightly")


def test_relative_paths_of_a_submitted_endpoints_evaluations_become_absolute(serving, tmp_path, tiny_data):
    job = serving("nightly").changed({"monitor.evaluations.0.job.data.train.0.source": tiny_data.name})
    moved = portable(job, folder=tiny_data.parent)
    assert moved.monitor.evaluations[0].job.data.train[0].source == str(tiny_data)
    with pytest.raises(ConfigError, match=r"monitor\.evaluations\.0\.job\.data\.train\.0\.source"):
        portable(job, folder=tmp_path / "elsewhere")
