"""A simulated cluster that fails: workers killed, a node lost, one drained with notice, one gone and another come.

Whatever happens, the curve is that of a run left alone, over the same rows.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from lmray.artifacts.checkpoints import checkpoint_name, committed
from lmray.artifacts.store import run_folder
from lmray.job import TrainJob
from lmray.on_ray.train import train
from lmray.testing.jobs import curve, run_here, tiny_job, tiny_rows, write_jsonl
from lmray.testing.waiting import wait_until
from tests.e2e.conftest import last_step

pytestmark = [pytest.mark.slow, pytest.mark.timeout(580)]

STEPS, KILLS, SEED = 240, 5, 0
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
DRAIN_S = 5.0
"""From a notice until the node is taken away."""
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "10",
}
COUNTED = ("train.tokens", "train.supervised_tokens", "train.epoch", "train.samples")
"""What tells one step's rows from another's."""


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory) -> Iterator[Cluster]:
    """A head without cores, to which nodes are added."""
    root = tmp_path_factory.mktemp("cluster")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        for name, value in (SETTINGS | {"HOME": str(root), "LMRAY_CACHE": str(root / "cache")}).items():
            patch.setenv(name, value)
        cluster = Cluster(
            initialize_head=True, connect=False, head_node_args={**NODE, "num_cpus": 0, "include_dashboard": False}
        )
        try:
            ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture
def nodes(ray_cluster) -> Iterator[Callable[[int], None]]:
    """Adds so many; what is left of them goes after the test."""

    def add(count: int) -> None:
        for _ in range(count):
            ray_cluster.add_node(**NODE)

    yield add
    for node in list(ray_cluster.worker_nodes):
        ray_cluster.remove_node(node, allow_graceful=False)


@pytest.fixture(scope="module")
def job(tiny_model, tmp_path_factory):
    """16 rows a step, on two workers where nothing else is said."""
    root = tmp_path_factory.mktemp("jobs")
    data = write_jsonl(root / "data.jsonl", tiny_rows(96))

    def make(name: str, workers: Any = 2, **changes: Any) -> TrainJob:
        steps = {"train__max_steps": STEPS, "train__learning_rate": 1e-3, "train__lr_scheduler_type": "constant"}
        steps |= {"train__gradient_accumulation_steps": 2, "train__save_steps": 20, "sharding": "ddp"}
        resources = {"workers": workers, "cpus_per_worker": 1, "max_failures": 50}
        return tiny_job(tiny_model, data, root / "store", name=name, **steps | {"resources": resources} | changes)

    return make


@pytest.fixture(scope="module")
def undisturbed(job, tmp_path_factory) -> TrainJob:
    """The same in this process."""
    alone = job("undisturbed", 1, sharding="single", train__gradient_accumulation_steps=4)
    run_here(alone, tmp_path_factory.mktemp("scratch"))
    return alone


class Running:
    """A job that trains on the cluster in another thread."""

    def __init__(self, job: TrainJob):
        self.folder, self._outcome = run_folder(job), {}
        self._thread = threading.Thread(target=self._run, args=(job,), daemon=True)
        self._thread.start()

    def _run(self, job: TrainJob) -> None:
        try:
            self._outcome["status"] = train(job, progress=False).status
        except BaseException as error:
            self._outcome["error"] = error

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Waits; the run must not have ended meanwhile."""
        wait_until(lambda: condition() or not self._thread.is_alive(), what, timeout_s=150)
        assert self._thread.is_alive(), f"ended before {what}: {self._outcome}"

    def at_step(self, step: int) -> bool:
        return last_step(self.folder) >= step

    def succeeded(self) -> bool:
        self._thread.join(timeout=240)
        assert not self._thread.is_alive(), "the run hangs"
        return self._outcome == {"status": "succeeded"}


def workers() -> dict[int, str]:
    """Process and node of each training worker that is alive."""
    there = [one for one in ray._private.state.actors().values() if one["ActorClassName"] == "RayTrainWorker"]
    return {one["Pid"]: one["Address"]["NodeID"] for one in there if one["State"] == "ALIVE" and one["Pid"]}


def since(before: dict[int, str]) -> dict[int, str]:
    """Those that were not there `before`."""
    return {pid: node for pid, node in workers().items() if pid not in before}


def lose(cluster: Cluster, node_id: str) -> None:
    (node,) = [one for one in cluster.worker_nodes if one.node_id == node_id]
    cluster.remove_node(node, allow_graceful=False)


def look_now() -> None:
    """Lets Ray count its nodes; it does so every 20 s by itself."""
    coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
    ray.get(coordinator.get_reserved_resources.remote("nobody", recompute=True), timeout=30)


def assert_as_if_undisturbed(one: TrainJob, undisturbed: TrainJob) -> None:
    """One curve, and every row of it once."""
    assert curve(one, "step") == list(range(1, STEPS + 1))
    for name in COUNTED:
        assert curve(one, name) == curve(undisturbed, name), name
    assert curve(one) == pytest.approx(curve(undisturbed), abs=1e-5)
    assert curve(one)[-1] < curve(one)[0] - 0.5, "the curve must move, else equality says nothing"
    assert not list(run_folder(one).glob(".*.tmp"))


def test_workers_killed_at_any_step(nodes, job, undisturbed):
    chance, old = random.Random(SEED), {}
    nodes(2)
    run = Running(one := job("killed"))
    for kill in range(KILLS):
        target = (kill + 1) * STEPS // (KILLS + 2) + chance.randrange(STEPS // (KILLS + 2))
        run.until(lambda at=target, old=old: run.at_step(at) and len(since(old)) == 2, f"two workers at step {target}")
        os.kill(chance.choice(sorted(since(old))), signal.SIGKILL)
        old = old | workers()
    assert run.succeeded()
    assert_as_if_undisturbed(one, undisturbed)


def test_a_node_that_is_lost(ray_cluster, nodes, job, undisturbed):
    nodes(3)
    run = Running(one := job("lost"))
    run.until(lambda: run.at_step(50), "step 50")
    before = workers()
    lost = sorted(before.values())[0]
    lose(ray_cluster, lost)
    run.until(lambda: len(since(before)) == 2, "two new workers")
    assert lost not in since(before).values()
    assert run.succeeded()
    assert_as_if_undisturbed(one, undisturbed)


def test_a_node_that_is_drained_with_notice(ray_cluster, nodes, job, undisturbed, capfd):
    """Nothing is lost but what was done after the notice, and `max_failures` is for failures."""
    nodes(3)
    resources = {"workers": 2, "cpus_per_worker": 1, "max_failures": 0}
    run = Running(one := job("drained", resources=resources, train__save_steps=STEPS))
    run.until(lambda: run.at_step(20), "step 20")
    before = workers()
    drained = sorted(before.values())[0]
    accepted, why = GcsClient(address=ray_cluster.gcs_address).drain_node(
        drained, DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "spot", int((time.time() + DRAIN_S) * 1000)
    )
    assert accepted, why
    run.until(lambda: committed(run.folder), "a checkpoint just in time")
    (just_in_time,) = committed(run.folder)
    run.until(lambda: len(since(before)) == 2, "two new workers")
    assert drained not in since(before).values()
    lose(ray_cluster, drained)
    assert run.succeeded()
    assert [path.name for path in committed(run.folder)] == [just_in_time.name, checkpoint_name(STEPS)]
    assert capfd.readouterr().err.count("notice: the machine of worker") == 1
    assert_as_if_undisturbed(one, undisturbed)


def test_from_two_workers_to_one_and_back(ray_cluster, nodes, job, undisturbed):
    nodes(2)
    elastic = {"min": 1, "max": 2, "resize_interval_s": 0.5}
    run = Running(one := job("elastic", elastic, sharding="fsdp2"))
    run.until(lambda: run.at_step(30), "step 30")
    both = workers()
    assert len(both) == 2
    lose(ray_cluster, sorted(both.values())[0])
    look_now()
    run.until(lambda: len(since(both)) == 1, "one worker")
    alone = since(both)
    newest = committed(run.folder)[-1]
    run.until(lambda: committed(run.folder)[-1] != newest, "a checkpoint of one worker")
    ray_cluster.add_node(**NODE)
    look_now()
    run.until(lambda: len(since(both | alone)) == 2, "two workers again")
    assert run.succeeded()
    assert_as_if_undisturbed(one, undisturbed)
