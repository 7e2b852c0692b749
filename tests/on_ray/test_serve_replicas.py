"""Several replicas on Ray Serve: where adapters are held, what faults under load cost, and an endpoint without any."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from typing import Any

import httpx
import pytest
import ray
from ray.exceptions import RayActorError

from lmray.errors import ConfigError
from lmray.job import ServeJob
from lmray.on_ray.serve import serve
from lmray.policies.autoscaling import PRESETS
from lmray.testing.listening import free_port
from lmray.testing.waiting import wait_until
from tests.on_ray.endpoints import (
    ADMIN_KEY,
    Load,
    ask,
    keep_version,
    kill_replica,
    make_job,
    replica_actors,
)

NAMES = tuple(f"adapter-{number}" for number in range(4))
MAX_TOKENS, REST_S = 32, 0.3


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("replicas")


@pytest.fixture(scope="module")
def job(ray_cluster, root) -> ServeJob:
    """An endpoint with two replicas over a store of adapters in production."""
    return make_job(root, NAMES, **{"autoscaling.min_replicas": 2})


def test_faults_under_load_cost_no_answer_that_had_not_begun(job, root, capfd):
    with serve(job) as service:
        wait_until(lambda: len(held(service.url)) == 2, "both replicas, where requests start")
        answers = ask(service.url, NAMES, max_tokens=MAX_TOKENS)
        assert len(set(answers.values())) == len(NAMES)
        one, other = held(service.url)
        assert one | other == set(NAMES) and not one & other, "each adapter is held by one replica"
        allowed = {name: {text} for name, text in answers.items()}
        with Load(service.url, NAMES, at_once=4, max_tokens=MAX_TOKENS, rest_s=REST_S) as load:
            load.wait_for(10)
            kill_replica(job)
            load.wait_for(10)
            keep_version(root, NAMES[0], seed=101)
            wait_until(lambda: len(held(service.url)) == 2, "both replicas again")
            replicas = replica_ids(service.url)
            service.update(job.changed({"http.limits.max_body_bytes": 2000}))
            wait_until(lambda: replica_ids(service.url), "replicas where requests start")
            assert replica_ids(service.url) <= replicas, "what the gateway alone has to know replaces no engine"
            load.wait_for(10)
            with pytest.raises(ConfigError, match=r"http.port: is 1, and a running endpoint keeps"):
                service.update(job.changed({"http.port": 1}))
        allowed[NAMES[0]] |= set(ask(service.url, NAMES[:1], max_tokens=MAX_TOKENS).values())
        assert len(allowed[NAMES[0]]) == 2, "the promoted version is what answers now"
        assert httpx.post(f"{service.url}/v1/completions", content=b" " * 3000, timeout=60).status_code == 413
    check_answers(load, allowed, num_dead=1)
    assert "graceful_shutdown failed" not in capfd.readouterr().out


@pytest.mark.slow  # two minutes and more: three starts of replicas one after another
def test_an_engine_that_ends_and_an_update_of_engines_cost_no_answer_that_had_not_begun(job):
    job = job.changed({"http.port": free_port()})
    with serve(job) as service:
        allowed = {name: {text} for name, text in ask(service.url, NAMES, max_tokens=MAX_TOKENS).items()}
        with Load(service.url, NAMES, at_once=4, max_tokens=MAX_TOKENS, rest_s=REST_S) as load:
            load.wait_for(10)
            break_engine(job)
            load.wait_for(10)
            replicas = replica_ids(service.url)
            service.update(job.changed({"engine.max_batch_size": 3}))
            wait_until(lambda: replica_ids(service.url), "replicas where requests start")
            assert not replica_ids(service.url) & replicas, "engines need to know that"
            load.wait_for(10)
    check_answers(load, allowed, num_dead=1)


def check_answers(load: Load, allowed: dict[str, set[str]], *, num_dead: int) -> None:
    """None was lost, none wrong; of each replica that died four at most broke off, the rows of its batch."""
    assert [one for one in load.outcomes if one.error and not one.begun] == []
    assert len([one for one in load.outcomes if one.error]) <= 4 * num_dead
    assert [one for one in load.outcomes if not one.error and one.text not in allowed[one.model]] == []


def held(url: str) -> list[set[str]]:
    """The adapters that each replica holds."""
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    listed = httpx.get(f"{url}/admin/adapters", headers=headers, timeout=60).json()
    assert [one["name"] for one in listed["adapters"]] == list(NAMES)
    return [{one["handle"].partition("@")[0] for one in replica["held"]} for replica in listed["replicas"]]


def replica_ids(url: str) -> set[str]:
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    listed = httpx.get(f"{url}/admin/adapters", headers=headers, timeout=60).json()
    return {one["replica"] for one in listed["replicas"]}


def break_engine(job: ServeJob) -> None:
    """Makes the next step of a running replica's engine fail, and waits for the replica's end."""

    def spoil(replica) -> bool:
        def fail():
            raise ArithmeticError("a step that cannot be done")

        live = getattr(replica._replica_impl._user_callable_wrapper._callable, "_live", None)
        if live is not None:
            live.engine._stepper.step = fail
        return live is not None

    def spoilt() -> list[str]:
        """The first that runs: the others start, or end."""
        for actor in replica_actors(job):
            with suppress(ValueError, RayActorError):
                if ray.get(ray.get_actor(actor, namespace="serve").__ray_call__.remote(spoil)):
                    return [actor]
        return []

    found: list[str] = []
    wait_until(lambda: found.extend(spoilt()) or found, "a replica that runs")
    wait_until(lambda: found[0] not in replica_actors(job), "the replica's end")


def test_an_endpoint_goes_down_to_no_replica_and_comes_back_when_asked(job, monkeypatch):
    quick = dataclasses.replace(PRESETS["fast"], downscale_delay_s=1.0, look_back_period_s=1.0)
    monkeypatch.setitem(PRESETS, "fast", quick)
    alone = {"autoscaling.min_replicas": 0, "autoscaling.max_replicas": 1, "http.port": free_port()}
    alone = job.changed(alone)  # at another port: the first endpoint's may still be on its way out
    with serve(alone) as service:
        answers = ask(service.url, NAMES)
        wait_until(lambda: not replica_actors(alone), "no replica")
        assert httpx.get(f"{service.url}/ready", timeout=60).status_code == 200, "it would be answered"
        listed = httpx.get(f"{service.url}/v1/models", timeout=60).json()
        assert {one["id"] for one in listed["data"]} >= set(NAMES), "names are known without a replica"
        assert ask(service.url, NAMES) == answers, "a replica has come back"


@pytest.mark.slow  # a minute; what the follower does is in test_serve_updates
def test_a_merged_model_answers_under_its_name_and_a_promotion_replaces_it_without_a_lost_request(job, root):
    """In fp32 the merged weights say what the same adapter says beside the base model."""
    name, beside = NAMES[1], "twin"
    keep_version(root, beside, seed=2)
    told: dict[str, Any] = {"autoscaling.min_replicas": 1, "autoscaling.max_replicas": 1, "http.port": free_port()}
    told["adapters"] = [
        {"artifact": name, "stage": "production", "merged": True},
        {"artifact": beside, "stage": "production"},
    ]
    told["monitor"] = {"sample_fraction": 1.0}
    with serve(job.changed(told)) as service:
        old = ask(service.url, (beside,), max_tokens=MAX_TOKENS)[beside]
        with Load(service.url, (name,), at_once=3, max_tokens=MAX_TOKENS, rest_s=REST_S) as load:
            load.wait_for(10)
            version = keep_version(root, name, seed=102).partition("@")[2]
            wait_until(lambda: load.outcomes[-1].text != old, "the new version's answers")
            load.wait_for(10)
        watched = f'lmray_serve_drift_answers_total{{model="{name}",version="{version}"}}'
        wait_until(lambda: watched in httpx.get(f"{service.url}/metrics", timeout=60).text, "scores of the new version")
    assert [one for one in load.outcomes if one.error] == []
    new = load.outcomes[-1].text
    assert {one.text for one in load.outcomes} == {old, new}
    order = sorted(load.outcomes, key=lambda one: one.started_s)
    assert order[0].text == old and order[-1].text == new
