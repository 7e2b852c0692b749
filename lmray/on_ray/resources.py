"""What the nodes of the connected cluster offer, asked of each: Ray itself knows no sizes of GPUs and no speeds."""

from __future__ import annotations

from dataclasses import replace

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lmray.errors import RemoteError
from lmray.models.machine import Machine, measure_flops, this_machine

PROBE_TIMEOUT_S = 120.0
GPU_SHARE = 0.01
"""Of a GPU, for as long as it is asked: enough for Ray to show it to the task."""


def cluster_machines(dtype: str, *, on_gpu: bool) -> tuple[tuple[Machine, ...], float]:
    """Every node that can run a worker, and the lowest speed of matrix products in `dtype` among them.

    Raises RemoteError where a node does not answer.
    """
    nodes = [facts for facts in ray.nodes() if facts["Alive"] and facts["Resources"].get("CPU")]
    probes = [_probe.options(**_placement(facts, on_gpu)).remote(dtype, on_gpu) for facts in nodes]
    _, waiting = ray.wait(probes, num_returns=len(probes), timeout=PROBE_TIMEOUT_S)
    if waiting:
        names = [facts["NodeManagerAddress"] for facts, probe in zip(nodes, probes, strict=True) if probe in waiting]
        hint = "its GPUs may all be taken, or the node is overloaded; `ray status` shows it"
        raise RemoteError(f"node {', '.join(names)}", f"did not answer in {PROBE_TIMEOUT_S:.0f} s", hint=hint)
    found = ray.get(probes)
    machines = tuple(_offered(facts, machine) for facts, (machine, _) in zip(nodes, found, strict=True))
    speeds = [speed for machine, (_, speed) in zip(machines, found, strict=True) if machine.gpus or not on_gpu]
    return machines, min(speeds, default=0.0)


def _placement(facts: dict, on_gpu: bool) -> dict:
    there = NodeAffinitySchedulingStrategy(facts["NodeID"], soft=False)
    share = GPU_SHARE if on_gpu and facts["Resources"].get("GPU") else 0
    return {"num_cpus": 0, "num_gpus": share, "scheduling_strategy": there}


def _offered(facts: dict, machine: Machine) -> Machine:
    """`machine` with the cores and GPUs that Ray hands out, which need not be all."""
    offered = facts["Resources"]
    return replace(
        machine,
        name=facts["NodeManagerAddress"],
        cpus=offered.get("CPU", 0.0),
        gpus=offered.get("GPU", 0.0),
    )


@ray.remote(max_retries=1)
def _probe(dtype: str, on_gpu: bool) -> tuple[Machine, float]:
    machine = this_machine()
    return machine, measure_flops(dtype, "cuda" if on_gpu and machine.gpus else "cpu")
