"""What Ray adds to a training run: the same curve, and going on after a worker or the controller is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray
import ray.train
import torch
from ray.util.placement_group import placement_group_table
from safetensors.torch import load_file

from lmray import pulse
from lmray.artifacts.store import run_folder
from lmray.context import Result
from lmray.errors import CapacityError, ConfigError, HangError, OutOfMemoryError
from lmray.methods import sft
from lmray.metrics.events import read_attempts, read_events
from lmray.on_ray import train as on_ray
from lmray.on_ray.context import STOP
from lmray.on_ray.train import train
from lmray.testing.jobs import curve, run_here, tiny_job
from lmray.testing.matrix import ADAPTERS, sharding, shared_by
from lmray.testing.waiting import wait_until
from lmray.train import hang
from lmray.train.learner import Learner


@pytest.fixture
def job(matrix_model, tiny_data, tmp_path):
    def make(store: str, *, adapter: str = "lora", **changes):
        changes = {"resources__cpus_per_worker": 1, **ADAPTERS[adapter], **changes}
        return tiny_job(matrix_model(adapter), tiny_data, tmp_path / store, **changes)

    return make


def weights(job) -> dict:
    (path,) = (run_folder(job) / job.adapter.kept).glob("*model.safetensors")
    return load_file(path)


def assert_same(one, expected, *, atol: float) -> None:
    """Each step once, with the losses that were expected, and in the end the weights."""
    steps = [event["step"] for event in read_events(run_folder(one) / "events.jsonl")]
    assert steps == list(range(1, one.train.max_steps + 1))
    assert curve(one) == pytest.approx(curve(expected), abs=atol)
    for name, tensor in weights(expected).items():
        assert (weights(one)[name] - tensor).abs().max() < 10 * atol


def processes(name: str) -> set[int]:
    """Of the local Ray, those that run the actor `name`."""
    found = set()
    for one in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended meanwhile
            if name in " ".join(one.cmdline()):
                found.add(one.pid)
    return found


def waiting_at(step: int, gate: Path):
    """What a worker runs that waits in the loss of `step` until there is `gate`."""
    worker = on_ray._worker

    def work(job):
        loss = sft.sft_loss

        def waits(model, batch):
            if pulse.PULSE.step == step:
                wait_until(gate.exists, "the test")
            return loss(model, batch)

        sft.sft_loss = waits
        return worker(job)

    return work


@pytest.fixture
def train_and(monkeypatch, tmp_path):
    """Trains a job, and does something beside it once there are `at` steps: the run waits for it soon after."""

    def run(job, act: Callable[[], object], *, at: int) -> Result:
        events, gate = run_folder(job) / "events.jsonl", tmp_path / "gate"
        monkeypatch.setattr(on_ray, "_worker", waiting_at(at + 2, gate))
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(train, job, progress=False)
            wait_until(lambda: len(read_events(events)) >= at or running.done(), f"{at} steps")
            assert not running.done(), running.result()
            try:
                act()
            finally:
                gate.touch()
            return running.result()

    return run


def killing(actor: str, count: int = 1) -> Callable[[], None]:
    """Kills one of the `count` processes of `actor` that are not there yet."""
    earlier = processes(actor)  # of other tests, on their way out

    def kill() -> None:
        new = processes(actor) - earlier
        assert len(new) == count
        os.kill(max(new), signal.SIGKILL)

    return kill


def test_a_killed_worker_loses_nothing_and_the_curve_is_the_local_one(ray_cluster, job, train_and, tmp_path):
    changes = {"train__max_steps": 16, "train__save_steps": 4, "output": {"artifact": "kept"}}
    local, remote = job("local", **changes), job("remote", **changes)
    run_here(local, tmp_path / "scratch")
    result = train_and(remote, killing("RayTrainWorker"), at=10)
    assert result.status == "succeeded" and result.artifact.startswith("kept@")
    assert_same(remote, local, atol=1e-6)
    assert train(remote, progress=False).status == "already-done"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "adapter", "killed"),
    [
        ("ddp", "lora", True),
        ("ddp", "full", False),
        ("ddp", "qlora", False),
        ("fsdp2", "lora", True),
        ("fsdp2", "full", False),
        ("zero 1", "full", False),
        ("zero 2", "lora", False),
        ("zero 3", "lora", False),
        ("zero 3", "full", False),
    ],
)
def test_two_workers_give_the_curve_of_one_also_when_one_is_killed(
    ray_cluster, job, train_and, tmp_path, strategy, adapter, killed
):
    steps = 12 if killed else 4
    changes = {"train__max_steps": steps, "train__save_steps": 4, "evaluate": {"tasks": ["loss"]}}
    local = job("local", adapter=adapter, **changes, **shared_by(1))
    remote = job("remote", adapter=adapter, **changes, **shared_by(2), sharding=sharding(strategy, tmp_path))
    alone = run_here(local, tmp_path / "scratch")
    if killed:
        result = train_and(remote, killing("RayTrainWorker", 2), at=6)
    else:
        result = train(remote, progress=False)
    assert result.status == "succeeded"
    assert_same(remote, local, atol=1e-5)
    for name in ("eval.loss", "base.loss"):
        assert result.metrics[name] == pytest.approx(alone.metrics[name], abs=1e-5)
    assert not list(run_folder(remote).glob(".*.tmp"))


def hanging_at(step: int, until: int):
    """What a worker runs whose loss never comes at `step`, in the attempts before number `until`. Then, and no sooner,
    its watchdog loses patience: how long steps take here says nothing."""
    worker = on_ray._worker

    def work(job):
        loss, look, folder, hangs = sft.sft_loss, hang.Watchdog.look, run_folder(job), threading.Event()

        def never_comes_back(model, batch):
            if pulse.PULSE.step == step and len(read_attempts(folder)) < until:
                hangs.set()
                threading.Event().wait()
            return loss(model, batch)

        def loses_patience(watchdog):
            if hangs.is_set():
                watchdog.timeout_s = 1.0
            return look(watchdog)

        sft.sft_loss, hang.Watchdog.look, hang.LONGEST_LOOK_S = never_comes_back, loses_patience, 0.5
        return worker(job)

    return work


@pytest.mark.slow  # two waits of its watchdog; that it ends all ranks is a test without Ray
def test_a_worker_that_hangs_starts_again_and_one_that_hangs_on_is_an_error(
    ray_cluster, job, tmp_path, monkeypatch, capfd
):
    local, remote = (job(name, train__max_steps=12, train__save_steps=4) for name in ("local", "remote"))
    run_here(local, tmp_path / "scratch")
    remote = remote.changed({"resources.step_timeout_s": 120.0, "resources.max_failures": 1})
    folder = run_folder(remote)
    monkeypatch.setattr(on_ray, "_worker", hanging_at(7, until=3))
    with pytest.raises(HangError, match="rank 0 of 1 at step 7, micro-batch 1 of 1: no progress for") as caught:
        train(remote, progress=False)
    assert str(folder / "stacks-0.txt") in str(caught.value)
    for name in ("stacks-0.txt", "earlier-stacks-0.txt"):
        assert "in never_comes_back" in (folder / name).read_text(encoding="utf-8")
    assert [(one.attempt, one.after_step) for one in read_attempts(folder)] == [(1, 0), (2, 4)]
    assert train(remote, progress=False).status == "succeeded"
    said = capfd.readouterr().err
    assert said.count("rank 0 of 1 at step 7, micro-batch 1 of 1: no progress for") >= 2, "the driver hears of each"
    assert curve(remote) == pytest.approx(curve(local), abs=1e-6)
    events = read_events(folder / "events.jsonl")
    assert [(event["step"], event["attempt"]) for event in events] == [
        *((step, 1) for step in range(1, 5)),
        *((step, 3) for step in range(5, 13)),
    ]
    assert [event["step"] for event in events if event.get("replayed")] == [5, 6]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize(("strategy", "adapter"), [("fsdp2", "lora"), ("zero 3", "full")])
def test_what_two_workers_saved_goes_on_on_one_and_on_four(
    ray_cluster, job, train_and, tmp_path, strategy, adapter, workers
):
    changes = {"adapter": adapter, "train__max_steps": 12, "train__save_steps": 1000}
    local = job("local", **changes, **shared_by(1))
    remote = job("remote", **changes, **shared_by(2), sharding=sharding(strategy, tmp_path))
    run_here(local, tmp_path / "scratch")
    result = train_and(remote, (run_folder(remote) / STOP).touch, at=1)
    assert result.status == "stopped"
    assert train(remote.changed({"resources.workers": workers}), progress=False).status == "succeeded"
    assert_same(remote, local, atol=1e-5)


def test_asked_to_stop_it_saves_and_the_same_job_goes_on(ray_cluster, job, train_and, tmp_path):
    remote = job("remote", name="実験", train__max_steps=12, train__save_steps=1000)
    local = job("local", train__max_steps=12, train__save_steps=1000)
    run_here(local, tmp_path / "scratch")
    folder = run_folder(remote)
    result = train_and(remote, (folder / STOP).touch, at=1)
    done = len(read_events(folder / "events.jsonl"))
    assert result.status == "stopped" and 0 < done < 12
    assert [path.name for path in folder.rglob("checkpoint-*")] == [f"checkpoint-{done:08d}"]
    assert train(remote, progress=False).status == "succeeded"
    assert_same(remote, local, atol=1e-6)


def test_what_is_not_there_is_refused_before_anything_is_written(ray_cluster, job):
    with pytest.raises(CapacityError, match="there is none"):
        train(job("s").model_copy(update={"resources": job("s").resources.model_copy(update={"gpus_per_worker": 1})}))
    with pytest.raises(ConfigError, match="nope"):
        train(job("s", adapter__target_modules=["nope"]))
    assert not run_folder(job("s")).exists()


def register(folder, *, known: str) -> None:
    """What Ray Train's own register of checkpoints looks like after a kill: it knows an older one only."""
    known_one = {"version": 0, "checkpoint_dir_name": known, "metrics": {}}
    state = {"ray_version": ray.__version__, "checkpoint_results": [known_one], "checkpoint_report_indices": [0]}
    state |= {"latest_checkpoint_result": known_one, "current_report_index": 1}
    (folder / "checkpoint_manager_snapshot.json").write_text(json.dumps(state), encoding="utf-8")


def test_whole_checkpoints_that_nobody_registered_are_taken_up_and_spoilt_ones_are_not(
    ray_cluster, job, train_and, tmp_path, capfd
):
    """And the controller is killed once: another one goes on by itself."""
    changes = {"train__max_steps": 24, "train__save_steps": 4}
    local, remote = job("local", **changes), job("remote", **changes)
    run_here(local, tmp_path / "scratch")
    run_here(remote, tmp_path / "scratch", stop_at=10)  # leaves checkpoints 8 and 10
    folder = run_folder(remote)
    register(folder, known="checkpoint-00000004")  # which is removed already
    shutil.copytree(folder / "checkpoint-00000010", folder / "checkpoint-00000012")
    (folder / "checkpoint-00000012" / "weights.safetensors").write_bytes(b"half")
    (folder / "checkpoint-00000016").mkdir(parents=True)
    kill, earlier = killing("TrainController"), processes("RayTrainWorker")

    def kill_with_its_worker() -> None:
        workers = processes("RayTrainWorker") - earlier
        kill()
        wait_until(lambda: not workers & processes("RayTrainWorker"), "the worker's end")

    result = train_and(remote, kill_with_its_worker, at=13)
    said = capfd.readouterr().err
    assert result.status == "succeeded"
    assert "checkpoint-00000012 is set aside, going on from checkpoint-00000010" in said
    assert "the run's controller died; going on" in said
    assert_same(remote, local, atol=1e-6)
    assert [path.name for path in sorted(folder.glob("*checkpoint-*"))] == [
        "checkpoint-00000020",
        "checkpoint-00000024",
    ]
    reserved = lambda: [one for one in placement_group_table().values() if one["state"] == "CREATED"]  # noqa: E731
    wait_until(lambda: not reserved(), "the bundles, also the dead controller's, to be given back")


@pytest.fixture
def poor_job(job, monkeypatch):
    """Of two workers, the second of which has room for two rows."""
    worker = on_ray._worker

    def poor_worker(job):
        real = Learner._loss

        def loss(self, batch):
            if sum(map(len, batch.lengths)) > 2:
                torch.empty(2**60, dtype=torch.uint8)
            return real(self, batch)

        if ray.train.get_context().get_world_rank() == 1:
            Learner._loss = loss
        return worker(job)

    monkeypatch.setattr(on_ray, "_worker", poor_worker)
    return job("remote").changed({"sharding": "ddp", "resources.workers": 2, "resources.max_failures": 0})


@pytest.mark.slow  # what becomes of the error is a test without a cluster, and that it ends all ranks one without Ray
def test_one_worker_that_runs_out_of_memory_ends_all(ray_cluster, poor_job):
    with pytest.raises(OutOfMemoryError, match=r"at step 1 with 4 row\(s\) a forward pass, on worker 1") as caught:
        train(poor_job, progress=False)
    assert "on_oom=halve" in caught.value.hint


@pytest.mark.slow  # three starts of workers; the same is learnt without Ray in tests/distributed
def test_one_worker_that_runs_out_of_memory_ends_all_and_halved_the_run_goes_on(
    ray_cluster, job, poor_job, tmp_path, capfd
):
    """It is no failure of those that `max_failures` allows."""
    local, remote = job("local", train__per_device_train_batch_size=8), poor_job
    run_here(local, tmp_path / "scratch")
    result = train(remote.changed({"resources.on_oom": "halve"}), progress=False)
    assert result.status == "succeeded" and result.details["micro_batch"] == 2
    assert "2 row(s) a forward pass instead of 4" in capfd.readouterr().err
    assert curve(remote) == pytest.approx(curve(local), abs=1e-5)
