"""An endpoint that cannot come up: what is said, and that nothing is left behind."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import ray
import torch
from ray import serve as ray_serve
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from safetensors.torch import load_file, save_file

from lmray.errors import CapacityError, DataError, RemoteError
from lmray.job import ServeJob
from lmray.on_ray import deployments
from lmray.on_ray import serve as module
from lmray.on_ray.cluster import ClusterResources, Node
from lmray.on_ray.replicas import RoutedReplicas, as_lmray_error
from lmray.on_ray.serve import serve
from lmray.testing.listening import free_port
from lmray.testing.tiny import tiny_model_folder


@pytest.fixture
def job(ray_cluster, tmp_path) -> ServeJob:
    return ServeJob.model_validate(
        {
            "name": "endpoint",
            "model": {"source": str(tiny_model_folder(tmp_path / "tiny"))},
            "engine": {"name": "native", "max_length": 64},
            "http": {"port": free_port()},
            "resources": {"cpus_per_worker": 1},
            "storage": str(tmp_path / "store"),
        }
    )


def test_weights_that_cannot_be_read_are_named_with_the_replicas_own_words(job, tmp_path):
    weights = tmp_path / "tiny" / "model.safetensors"
    save_file({**load_file(weights), "model.norm.weight": torch.zeros(7)}, weights, metadata={"format": "pt"})
    with pytest.raises(RemoteError) as caught:
        serve(job)
    assert f"did not start: model folder {tmp_path / 'tiny'}: cannot be loaded" in str(caught.value)
    assert "hint: download or convert it again" in str(caught.value)
    assert ray_serve.status().applications == {}


def test_ray_serve_that_does_not_start_is_named_and_ended(job, monkeypatch):
    begin = ray_serve.start

    def late(**told):
        begin(**told)
        raise TimeoutError("HTTP proxies not available after 60s.")

    monkeypatch.setattr(ray_serve, "start", late)
    with pytest.raises(RemoteError, match="Ray Serve did not start: HTTP proxies not available"):
        serve(job)
    with pytest.raises(ValueError, match="Failed to look up actor"):
        ray.get_actor(module.CONTROLLER, module.NAMESPACE)


def test_an_idle_ray_serve_of_somebody_elses_is_left_alone(job):
    ray_serve.start(http_options={"port": free_port()})
    try:
        with pytest.raises(CapacityError, match="already runs there, with an address and limits of its own"):
            serve(job)
        assert ray.get_actor(module.CONTROLLER, module.NAMESPACE)
    finally:
        ray_serve.shutdown()


def test_replicas_that_can_never_be_placed_are_refused(job):
    with pytest.raises(CapacityError, match=r"1 replica\(s\) with 64 CPU\(s\) and 0 GPU\(s\) each do not fit"):
        serve(job.changed({"resources.cpus_per_worker": 64}))


def test_an_address_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(module, "READY_TIMEOUT_S", 0.01)
    with pytest.raises(RemoteError, match="is not ready after 0 s; it said nothing"):
        module._await_ready("http://127.0.0.1:1")


def test_what_a_replica_raises_becomes_lmrays_error():
    error = DataError("request r", "the prompt is empty")
    assert as_lmray_error(RayTaskError("stream", "a traceback", error).as_instanceof_cause()) is error
    assert isinstance(as_lmray_error(BackPressureError(9, 8)), CapacityError)
    dead = as_lmray_error(ActorDiedError())
    assert isinstance(dead, RemoteError) and "no replica answered: ActorDiedError" in str(dead)
    assert isinstance(as_lmray_error(ActorUnavailableError("not now", None)), RemoteError)


def test_a_bug_in_a_replica_is_no_reason_to_ask_another():
    bug = RayTaskError("stream", "a traceback\nZeroDivisionError: by zero", ZeroDivisionError("by zero"))
    error = as_lmray_error(bug.as_instanceof_cause())
    assert not isinstance(error, RemoteError) and "a replica failed: ZeroDivisionError: by zero" in str(error)


@pytest.mark.parametrize(("host", "asked"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", "[::1]")])
def test_an_endpoint_on_all_addresses_is_asked_at_loopback(host, asked):
    assert module._reachable(host) == asked


@pytest.mark.parametrize(("cpus", "percent"), [(1.0, 0), (2.0, 0), (3.0, 20)])
def test_new_replicas_start_beside_the_old_ones_where_there_is_room_for_one_more(monkeypatch, tmp_path, cpus, percent):
    node = Node("here", cpus, 0.0, 0.0)
    monkeypatch.setattr(deployments, "cluster_resources", lambda: ClusterResources((node,)))
    job = ServeJob.model_validate(
        {
            "name": "endpoint",
            "model": {"source": "tiny"},
            "adapters": [{"artifact": "helper", "merged": True}],
            "engine": {"name": "native"},
            "storage": str(tmp_path),
        }
    )
    assert deployments.surge_percent(job, 1) == percent, "the base and the merged model take a core each"


class Answers:
    """A handle whose replicas answer a broadcast with `found`."""

    def __init__(self, *found: object):
        self.found = found

    def options(self, **told) -> Answers:
        return self

    def broadcast(self, method: str, *arguments: object) -> Answers:
        return self

    async def results_async(self, **told) -> list[object]:
        if isinstance(self.found[0], TimeoutError | DeploymentUnavailableError):
            raise self.found[0]
        return list(self.found)


def everywhere(*found: object) -> list[object]:
    handle: Any = Answers(*found)
    return asyncio.run(RoutedReplicas(handle).everywhere("stats"))


def test_a_replica_that_dies_while_all_are_asked_is_left_out():
    assert everywhere({"held": 1}, ActorDiedError()) == [{"held": 1}]
    assert everywhere(ActorDiedError()) == everywhere(DeploymentUnavailableError(DeploymentID("engine"))) == []


def test_what_one_of_all_replicas_raises_is_raised():
    error = DataError("adapter `x`", "is none")
    with pytest.raises(DataError, match="adapter `x`: is none"):
        everywhere(1, RayTaskError("manage", "a traceback", error).as_instanceof_cause())
    with pytest.raises(RemoteError, match="no replica answered: TimeoutError"):
        everywhere(TimeoutError())


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (RuntimeError("no proxy"), RemoteError, "endpoint `endpoint`: Ray Serve did not start: no proxy"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_what_fails_while_ray_serve_itself_starts_leaves_nothing_running(monkeypatch, error, raised, said):
    """No cluster runs here: Ray Serve is what these say it is."""
    done: list[str] = []

    def start(**options: Any) -> None:
        done.append("start")
        raise error

    for name, given in (("prepare", None), ("_cpus_per_replica", 1), ("_check_free", None)):
        monkeypatch.setattr(module, name, lambda job, given=given: given)
    monkeypatch.setattr(module.ray_serve, "start", start)
    monkeypatch.setattr(module.Service, "stop", lambda self: done.append("stop"))
    own = ServeJob.model_validate({"name": "endpoint", "model": {"source": "x"}, "engine": "native"})
    with pytest.raises(raised, match=said):
        serve(own)
    assert done == ["start", "stop"]


def test_a_replica_that_is_to_go_has_as_long_as_an_answer_may_take():
    fields = {"name": "endpoint", "model": {"source": "tiny"}, "engine": {"name": "native", "max_length": 16}}
    job = ServeJob.model_validate({**fields, "http": {"limits": {"answer_timeout_s": 4000.0}}})
    assert deployments._lasting(job)["graceful_shutdown_timeout_s"] > 4000
