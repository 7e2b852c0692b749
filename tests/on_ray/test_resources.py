"""What nodes say of themselves."""

from __future__ import annotations

import pytest

from lmray.cli.preflight import look
from lmray.errors import RemoteError
from lmray.on_ray import resources
from lmray.on_ray.resources import cluster_machines


def test_every_node_says_what_it_offers(ray_cluster):
    machines, speed = cluster_machines("float32", on_gpu=False)
    (machine,) = machines
    assert (machine.cpus, machine.gpus) == (4, 0), "what Ray hands out, not what the machine has"
    assert machine.memory_bytes > 10**8 and speed > 1e6
    assert look("float32", on_gpu=False, cluster=True)[0] == machines


def test_a_node_that_does_not_answer_is_named(ray_cluster, monkeypatch):
    monkeypatch.setattr(resources, "PROBE_TIMEOUT_S", 0.0)
    with pytest.raises(RemoteError, match=r"node .* did not answer"):
        cluster_machines("float32", on_gpu=False)
