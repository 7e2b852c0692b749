"""Several replicas on Ray Serve: where adapters are held, what a dead replica costs, and an endpoint without any."""

from __future__ import annotations

import dataclasses
import random
import socket
from contextlib import suppress

import httpx
import openai
import pytest
import ray
from ray import serve as ray_serve

from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.store import open_store
from lmray.job import ServeJob
from lmray.models.source import find_model
from lmray.on_ray.serve import serve
from lmray.policies.autoscaling import PRESETS
from lmray.testing.tiny import tiny_adapter_folder, tiny_model_folder

NAMES, ADMIN_KEY = tuple(f"adapter-{seed}" for seed in range(4)), "an operator's key"


@pytest.fixture(scope="module")
def job(ray_cluster, tmp_path_factory) -> ServeJob:
    """An endpoint with two replicas over a store of adapters in production."""
    root = tmp_path_factory.mktemp("replicas")
    model = tiny_model_folder(root / "tiny")
    artifacts = Artifacts(open_store(str(root / "store")))
    base = {"source": str(model), "revision": None, "digest": find_model(str(model)).digest}
    for seed, name in enumerate(NAMES):
        folder = tiny_adapter_folder(model, root / name, seed=seed + 1)
        artifacts.promote(artifacts.keep(name, folder, base=base).ref, "production")
    (root / "admin-keys").write_text(f"{ADMIN_KEY}\n")
    return ServeJob.model_validate(
        {
            "name": "replicas",
            "model": {"source": str(model), "dtype": "float32"},
            "adapters": [{"artifact": "adapter-*", "stage": "production"}],
            "engine": {"name": "native", "max_batch_size": 4, "max_length": 256},
            "http": {"port": free_port(), "admin_keys_file": str(root / "admin-keys")},
            "autoscaling": {"min_replicas": 2, "max_replicas": 2, "preset": "fast"},
            "resources": {"cpus_per_worker": 1},
            "storage": str(root / "store"),
        }
    )


def ask(url: str) -> dict[str, str | None]:
    """What each adapter answers."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        told = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 8}
        return {name: client.chat.completions.create(model=name, **told).choices[0].message.content for name in NAMES}


def free_port() -> int:
    """One that the system gives to nobody else meanwhile: it picks from higher ones."""
    with socket.socket() as probe:
        for port in random.sample(range(18000, 28000), 100):
            with suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
    raise AssertionError("none of a hundred ports is free")


def replica_actors(job: ServeJob) -> list[str]:
    names = ray.util.list_named_actors(all_namespaces=True)
    return [one["name"] for one in names if f"{job.name}#engine" in one["name"]]


def test_adapters_have_a_home_and_a_dead_replica_costs_no_answer(job):
    with serve(job) as service:
        answers = ask(service.url)
        assert len(set(answers.values())) == len(NAMES)
        assert ask(service.url) == answers
        listed = httpx.get(
            f"{service.url}/admin/adapters", headers={"Authorization": f"Bearer {ADMIN_KEY}"}, timeout=60
        ).json()
        assert [one["name"] for one in listed["adapters"]] == list(NAMES)
        held = [{one["handle"].partition("@")[0] for one in replica["held"]} for replica in listed["replicas"]]
        assert len(held) == 2 and held[0] | held[1] == set(NAMES) and not held[0] & held[1]
        victim = replica_actors(job)[0]
        ray.kill(ray.get_actor(victim, namespace="serve"))
        assert ask(service.url) == answers


def test_an_endpoint_goes_down_to_no_replica_and_comes_back_when_asked(job, monkeypatch):
    quick = dataclasses.replace(PRESETS["fast"], downscale_delay_s=1.0, look_back_period_s=1.0)
    monkeypatch.setitem(PRESETS, "fast", quick)
    alone = {"autoscaling.min_replicas": 0, "autoscaling.max_replicas": 1, "http.port": free_port()}
    alone = job.changed(alone)  # at another port: the first endpoint's may still be on its way out
    with serve(alone) as service:
        answers = ask(service.url)
        while replica_actors(alone):
            pass
        listed = httpx.get(f"{service.url}/v1/models", timeout=60).json()
        assert {one["id"] for one in listed["data"]} >= set(NAMES), "names are known without a replica"
        assert ask(service.url) == answers
        assert ray_serve.status().applications[alone.name].deployments["engine"].replica_states
