"""Load and faults on a running endpoint: 200 requests and more over 20 adapters, each of which answers with a text of
its own, while replicas come, go, die and are replaced."""

from __future__ import annotations

import dataclasses
import sys

import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from lmray.errors import RemoteError
from lmray.job import ServeJob
from lmray.on_ray.serve import serve
from lmray.policies.autoscaling import PRESETS
from lmray.testing.tiny import tiny_model_folder
from lmray.testing.waiting import wait_until
from tests.on_ray.endpoints import (
    Load,
    ask,
    keep_version,
    kill_replica,
    make_job,
    replica_actors,
    resident_by_process,
    resident_bytes,
)
from tests.on_ray.local import local_ray

pytestmark = [pytest.mark.slow, pytest.mark.timeout(580)]

NAMES = tuple(f"adapter-{number}" for number in range(20))
MAX_TOKENS, AT_ONCE, ROWS = 32, 8, 4
GROWTH_BYTES = 48 * 2**20
"""What a replica or the gateway may hold more after two hundred answers than after one from each adapter."""


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory):
    with local_ray(tmp_path_factory.mktemp("ray")):
        yield


def test_no_request_is_lost_nor_answered_by_another_adapter(ray_cluster, tmp_path, monkeypatch):
    quick = dataclasses.replace(PRESETS["fast"], downscale_delay_s=2.0)
    monkeypatch.setitem(PRESETS, "fast", quick)
    root = tmp_path / "load"
    root.mkdir()
    job = make_job(root, NAMES)
    with serve(job) as service:
        answers = ask(service.url, NAMES, max_tokens=MAX_TOKENS)
        assert len(set(answers.values())) == len(NAMES)
        allowed = {name: {text} for name, text in answers.items()}
        wait_until(lambda: len(replica_actors(job)) == 1, "one replica")
        with Load(service.url, NAMES, at_once=AT_ONCE, max_tokens=MAX_TOKENS) as load:
            wait_until(lambda: len(resident_bytes(job)) == 2, "a second replica")
            load.wait_for(20)
            kill_replica(job)
            load.wait_for(40)
            keep_version(root, NAMES[0], seed=101)
            load.wait_for(40)
            service.update(job.changed({"http.limits.max_body_bytes": 2000}))
            load.wait_for(max(40, 200 - len(load.outcomes)))
        wait_until(lambda: len(replica_actors(job)) == 1, "one replica again")
        service.update(job.changed({"autoscaling.max_replicas": 1}))  # what is measured below is the same process
        now = ask(service.url, NAMES, max_tokens=MAX_TOKENS)
        allowed[NAMES[0]].add(now[NAMES[0]])
        assert len(allowed[NAMES[0]]) == 2, "the promoted version is what answers now"
        wait_until(lambda: len(_resident(job)) == 2, "the end of those before")
        before = _resident(job)
        with Load(service.url, NAMES, at_once=AT_ONCE, max_tokens=MAX_TOKENS) as more:
            more.wait_for(200)
        after = _resident(job)
    assert [one.error for one in more.outcomes if one.error] == []
    lost = [one for one in load.outcomes if one.error and not one.begun]
    broken = [one for one in load.outcomes if one.error and one.begun]
    wrong = [one for one in load.outcomes if not one.error and one.text not in allowed[one.model]]
    grown = {process: after.get(process, 0) - held for process, held in before.items()}
    told = f"{len(load.outcomes)} requests, {len(broken)} broke off; grown by {grown} bytes of {before}"
    print(told, file=sys.stderr)
    assert lost == [] and wrong == []
    assert len(broken) <= ROWS, "an answer that had begun breaks off only where its replica died"
    assert before.keys() == after.keys(), "the same gateway and the same replica"
    assert max(grown.values()) < GROWTH_BYTES, told


def _resident(job: ServeJob) -> dict[int, int]:
    """Bytes that the gateway and the replica hold, by process."""
    return resident_by_process(job) | resident_by_process(job, "gateway")


@pytest.mark.parametrize("cpus", [1, 4], ids=["beside the old replica", "in its place"])
def test_an_update_that_fails_leaves_the_endpoint_as_it_was(ray_cluster, tmp_path, cpus):
    root = tmp_path / f"update-{cpus}"
    root.mkdir()
    job = make_job(root, NAMES[:1], **{"autoscaling.max_replicas": 1, "resources.cpus_per_worker": cpus})
    draft = tiny_model_folder(root / "draft")
    weights = draft / "model.safetensors"
    save_file({**load_file(weights), "model.norm.weight": torch.zeros(7)}, weights, metadata={"format": "pt"})
    with serve(job) as service:
        answers = ask(service.url, ("tiny", *NAMES[:1]))
        with pytest.raises(RemoteError, match=r"did not start: model folder .*draft: cannot be loaded"):
            service.update(job.changed({"adapters": [], "engine.speculation": {"name": "draft", "model": str(draft)}}))
        assert ask(service.url, ("tiny", *NAMES[:1])) == answers
        service.update(job.changed({"adapters": []}))
        with pytest.raises(openai.NotFoundError):
            ask(service.url, NAMES[:1])
