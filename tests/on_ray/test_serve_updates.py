"""What an endpoint does while it changes, and where that fails: the order of deployments, going back, giving up."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve import RunTarget
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from lmray.errors import ArtifactError, ConfigError, RemoteError
from lmray.job import ServeJob
from lmray.on_ray import serve as module
from lmray.on_ray.cluster import ClusterResources, Node
from lmray.on_ray.serve import Service, _Serving
from lmray.testing.waiting import wait_until

FAILS, PENDING = ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.DEPLOYING


class FakeServe:
    """Ray Serve, in which an application comes up unless `fates` says otherwise for what is deployed."""

    RunTarget = RunTarget

    def __init__(self):
        self.applications: dict[str, Any] = {}
        self.done: list[str] = []
        self.fates: dict[str, ApplicationStatus | Exception] = {}
        self.deploying = threading.Event()

    def run_many(self, targets: list[RunTarget], *, wait_for_applications_running: bool) -> None:
        assert not wait_for_applications_running, "would wait for ever"
        (target,) = targets
        what: Any = target.target
        self.done.append(what)
        fate = self.fates.get(what, ApplicationStatus.RUNNING)
        if isinstance(fate, Exception):
            raise fate
        engine = SimpleNamespace(message=f"no room for {what}" if fate == PENDING else "")
        found = SimpleNamespace(status=fate, message=f"{what} is broken", deployments={"engine": engine})
        self.applications[target.name] = found
        self.deploying.set()

    def status(self) -> Any:
        return SimpleNamespace(applications=dict(self.applications))

    def delete(self, name: str, *, _blocking: bool) -> None:
        assert not _blocking
        self.done.append(f"delete {name}")
        self.applications.pop(name, None)


@pytest.fixture
def ray_serve(monkeypatch) -> FakeServe:
    """What is deployed is told as `gateway@max_length:num_cpus` and `source:num_cpus`."""
    fake = FakeServe()
    node = Node("here", 8.0, 0.0, 0.0)
    monkeypatch.setattr(module, "ray_serve", fake)
    monkeypatch.setattr(module, "EVERY_S", 0.001)
    monkeypatch.setattr(module, "POLL_S", 0.001)
    monkeypatch.setattr(module, "_end_ray_serve", lambda: None)
    monkeypatch.setattr(module, "cluster_resources", lambda: ClusterResources((node,)))
    monkeypatch.setattr(module, "prepare", lambda job, listens=True: plan_of(job))
    gateway = lambda job, plan, num_cpus, **told: f"gateway@{job.engine.max_length}:{num_cpus}"  # noqa: E731
    monkeypatch.setattr(module, "endpoint_application", gateway)
    monkeypatch.setattr(module, "engine_application", engine_told)
    monkeypatch.setattr(module, "merged_source", lambda served, plan: f"{served.artifact}@1")
    return fake


def engine_told(job: ServeJob, plan: Any, num_cpus: int, *, num_lost: int = 0) -> str:
    return f"{plan.source}:{num_cpus}" + f", lost {num_lost}" * bool(num_lost)


def plan_of(job: ServeJob) -> Any:
    merged = {one.artifact: merged_version(f"{one.artifact}@1") for one in job.adapters if one.merged}
    return SimpleNamespace(digest=f"weights of {job.model.source}", merged=merged)


def merged_version(source: str) -> Any:
    return SimpleNamespace(source=source)


@pytest.fixture
def job(tmp_path) -> ServeJob:
    return ServeJob.model_validate(
        {
            "name": "endpoint",
            "model": {"source": "tiny"},
            "adapters": [{"artifact": "fn", "merged": True}],
            "engine": {"name": "native", "max_length": 64},
            "autoscaling": {"max_replicas": 1},
            "storage": str(tmp_path),
        }
    )


@pytest.fixture
def start(ray_serve) -> Any:
    """Starts a service over the fake; the services that were started end with the test."""
    started: list[Service] = []

    def start(job: ServeJob, *, ended: Callable[[], bool] = lambda: False) -> Service:
        service = Service(_Serving(job, plan_of(job), module._cpus_per_replica(job)), ended=ended)
        started.append(service)
        service._start(service._serving)
        return service

    yield start
    for service in started:
        service.stop()


def follow(monkeypatch, source: str, merge: Callable[[Any, Any], Any]) -> None:
    """From now on the stage of each merged model holds `source`, which `merge` merges."""
    monkeypatch.setattr(module, "merged_plan", merge)
    monkeypatch.setattr(module, "merged_source", lambda served, plan: source)


def test_a_promotion_that_cannot_be_served_is_told_once_and_later_ones_are_heard(
    monkeypatch, ray_serve, start, job, caplog
):
    start(job)
    looks: list[str] = []

    def fails(served, plan):
        looks.append("merged")
        raise ValueError("NaNs detected")

    follow(monkeypatch, "fn@2", fails)
    wait_until(lambda: looks, "a look at it")
    follow(monkeypatch, "fn@3", lambda served, plan: merged_version("fn@3"))
    wait_until(lambda: "fn@3:4" in ray_serve.done, "the next version")
    assert looks == ["merged"]
    assert [one.getMessage() for one in caplog.records] == ["merged model `fn` stays as it is: NaNs detected"]


def test_a_promotion_that_the_disk_refuses_is_tried_again_and_told_once(monkeypatch, ray_serve, start, job, caplog):
    start(job)
    failures = [OSError("disk full"), OSError("disk full"), OSError("disk full")]

    def merge(served, plan):
        if failures:
            raise failures.pop()
        return merged_version("fn@2")

    follow(monkeypatch, "fn@2", merge)
    wait_until(lambda: "fn@2:4" in ray_serve.done, "the promoted version")
    assert [one.getMessage() for one in caplog.records] == ["merged model `fn` stays as it is: disk full"]


def test_a_refused_version_is_tried_again_by_itself_and_told_once(monkeypatch, ray_serve, start, job, caplog):
    monkeypatch.setattr(module, "RETRY_S", 0.001)
    service, waits = start(job), list[float]()

    def merge(served, plan):
        if len(waits) < 4:
            waits.append(service._refused["fn"].wait_s if service._refused else 0.0)
            raise ArtifactError("adapter", "no room at the moment")
        return merged_version("fn@2")

    follow(monkeypatch, "fn@2", merge)
    wait_until(lambda: "fn@2:4" in ray_serve.done, "the promoted version")
    assert waits == [0.0, 0.001, 0.002, 0.004]
    assert len([one for one in caplog.records if "no room at the moment" in one.getMessage()]) == 1


def test_a_refused_version_is_tried_ever_more_seldom_however_often_it_was(monkeypatch, job):
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 0.0))
    service, waits = Service(_Serving(job, plan_of(job), 1), ended=lambda: False), list[float]()
    for _ in range(2000):
        service._refuse("fn", "fn@2", again=True)
        waits.append(service._refused["fn"].until_s)
    assert waits[:8] == [60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 3600.0, 3600.0] and waits[-1] == 3600.0
    assert not service._is_due("fn", "fn@2") and service._is_due("fn", "fn@3")


def test_a_stage_that_holds_nothing_for_long_ends_no_follower(monkeypatch, ray_serve, start, job, caplog):
    service = start(job)
    looks: list[str] = []

    def empty(served, plan):
        looks.append("look")
        raise ArtifactError("artifact `fn`", "has nothing in production")

    monkeypatch.setattr(module, "merged_source", empty)
    wait_until(lambda: len(looks) > 20, "looks at it")
    assert service._refused == {}
    follow(monkeypatch, "fn@2", lambda served, plan: merged_version("fn@2"))
    wait_until(lambda: "fn@2:4" in ray_serve.done, "the promoted version")
    assert len([one for one in caplog.records if "has nothing" in one.getMessage()]) == 1


def test_a_refused_version_is_tried_again_once_the_stage_has_been_elsewhere(monkeypatch, ray_serve, start, job):
    service = start(job)
    refuse: list[bool] = [True]

    def merge(served, plan):
        if refuse:
            raise ArtifactError("adapter", "cannot be merged")
        return merged_version("fn@2")

    follow(monkeypatch, "fn@2", merge)
    wait_until(lambda: service._refused, "the refusal")
    refuse.clear()
    follow(monkeypatch, "fn@1", merge)
    wait_until(lambda: not service._refused, "a look at what is served")
    follow(monkeypatch, "fn@2", merge)
    wait_until(lambda: "fn@2:4" in ray_serve.done, "the promoted version")


def test_a_promotion_that_does_not_start_goes_back_to_what_was_served(monkeypatch, ray_serve, start, job):
    service = start(job)
    ray_serve.fates["fn@2:4"] = FAILS
    follow(monkeypatch, "fn@2", lambda served, plan: merged_version("fn@2"))
    wait_until(lambda: service._refused, "the refusal")
    assert service._refused["fn"].until_s == math.inf, "each try might cost the replicas that run"
    assert ray_serve.done == ["fn@1:4", "gateway@64:4", "fn@2:4", "fn@1:4"]


def test_a_model_that_is_lost_comes_back_with_its_stage_and_costs_no_other_its_replicas(
    monkeypatch, ray_serve, start, job
):
    service = start(job)
    ray_serve.fates |= {"fn@2:4": FAILS, "fn@1:4": FAILS}
    follow(monkeypatch, "fn@2", lambda served, plan: merged_version("fn@2"))
    wait_until(lambda: service._refused, "the refusal")
    follow(monkeypatch, "fn@1", lambda served, plan: merged_version("fn@1"))
    wait_until(lambda: "fn@1:4, lost 1" in ray_serve.done, "the version before")
    done = ["fn@1:4", "gateway@64:4", "fn@2:4", "fn@1:4", "fn@1:4, lost 1"]
    assert ray_serve.done == done, "Ray Serve does not try the same a second time"
    assert service._num_lost == {"endpoint.fn": 1}


def test_a_store_that_cannot_be_read_for_a_moment_forgets_no_refusal(monkeypatch, ray_serve, start, job):
    service = start(job)
    ray_serve.fates["fn@2:4"] = FAILS
    follow(monkeypatch, "fn@2", lambda served, plan: merged_version("fn@2"))
    wait_until(lambda: service._refused, "the refusal")
    refused, looks = dict(service._refused), list[str]()

    def unreadable(served, plan):
        looks.append("look")
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module, "merged_source", unreadable)
    wait_until(lambda: len(looks) > 3, "looks")
    assert service._refused == refused


def test_an_update_that_does_not_start_goes_back_to_all_that_ran(monkeypatch, ray_serve, start, job):
    service = start(job)
    follow(monkeypatch, "fn@2", lambda served, plan: merged_version("fn@2"))
    wait_until(lambda: service._serving.plan.merged["fn"].source == "fn@2", "the promoted version")
    ray_serve.done.clear()
    ray_serve.fates["gateway@32:4"] = FAILS
    other = [{"artifact": "other", "merged": True}]
    with pytest.raises(RemoteError, match=r"endpoint `endpoint`: did not start: gateway@32:4 is broken"):
        service.update(job.changed({"engine.max_length": 32, "adapters": other}))
    went = ["delete endpoint.fn", "other@1:4", "gateway@32:4"]
    back = ["delete endpoint.other", "fn@2:4", "gateway@64:4"]
    assert ray_serve.done == went + back, "what was left out goes first, and what was promoted comes back"
    assert service._serving.job is job


def test_an_update_says_where_what_ran_does_not_come_back(ray_serve, start, job):
    service = start(job)
    ray_serve.fates |= {"gateway@32:4": FAILS, "gateway@64:4": RayServeException("the controller is gone")}
    with pytest.raises(RemoteError, match="and what ran does not start again: did not start: the controller is gone"):
        service.update(job.changed({"engine.max_length": 32}))


def test_an_update_to_another_base_model_is_refused_before_anything_changes(ray_serve, start, job):
    service = start(job)
    ray_serve.done.clear()
    with pytest.raises(ConfigError, match=r"model.source: is `small`, with other weights, and a running .* tiny"):
        service.update(job.changed({"model.source": "small"}))
    assert ray_serve.done == []


def test_replicas_keep_their_cpus_when_a_merged_model_goes(ray_serve, start, job):
    service = start(job)
    ray_serve.done.clear()
    service.update(job.changed({"adapters": []}))
    assert ray_serve.done == ["delete endpoint.fn", "gateway@64:4"], "all eight would not fit beside the old ones"
    service.update(job.changed({"adapters": [], "resources.cpus_per_worker": 8}))
    assert ray_serve.done[-1] == "gateway@64:8"


def test_an_update_that_finds_no_room_is_given_up(monkeypatch, ray_serve, start, job):
    monkeypatch.setattr(module, "START_TIMEOUT_S", 0.01)
    monkeypatch.setattr(module, "shutdown_s", lambda answer_timeout_s: 0.0)
    service = start(job)
    ray_serve.fates["gateway@32:4"] = PENDING
    with pytest.raises(RemoteError, match=r"did not start within 0 s: no room for gateway@32:4\n  hint: .*lower"):
        service.update(job.changed({"engine.max_length": 32}))
    assert ray_serve.done[-1] == "gateway@64:4"


def test_an_update_that_finds_no_room_ends_with_the_endpoint(ray_serve, start, job):
    service = start(job, ended=lambda: "gateway@32:4" in ray_serve.done)
    ray_serve.fates["gateway@32:4"] = PENDING
    with pytest.raises(RemoteError, match="endpoint `endpoint`: was stopped before it answered"):
        service.update(job.changed({"engine.max_length": 32}))
    assert ray_serve.done[-1] == "gateway@32:4", "nothing is started that is to end"


def test_stopping_does_not_wait_for_a_promotion_that_finds_no_room(monkeypatch, ray_serve, start, job):
    service = start(job)
    ray_serve.fates["fn@2:4"] = PENDING
    ray_serve.deploying.clear()
    follow(monkeypatch, "fn@2", lambda served, plan: merged_version("fn@2"))
    assert ray_serve.deploying.wait(60)
    stopping = threading.Thread(target=service.stop, daemon=True)
    stopping.start()
    stopping.join(timeout=60)
    assert not stopping.is_alive() and not ray_serve.applications
