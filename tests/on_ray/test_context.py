"""What a worker's context adds to that of any group, and what the driver outlasts. No cluster needed."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import ray.train
from ray.exceptions import ActorDiedError
from ray.train import PreemptionInfo
from ray.train.v2._internal.execution.preemption import PreemptionContext

from lmray.artifacts.files import only_writer
from lmray.errors import CapacityError, CheckpointError, HangError, RemoteError
from lmray.on_ray import cluster, context, preemption, train
from lmray.on_ray.cluster import ClusterResources, Node
from lmray.on_ray.context import RayContext
from lmray.testing.jobs import tiny_job


@pytest.fixture
def told():
    """What Ray Train keeps of a worker; a notice is put where its watcher puts it."""
    return SimpleNamespace(preemption_context=PreemptionContext())


@pytest.fixture
def ctx(tmp_path, monkeypatch, told):
    place = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(ray.train, "get_context", lambda: place)
    monkeypatch.setattr(preemption, "get_train_context", lambda: told)
    made = RayContext(tmp_path / "run", device="cpu", threads=1)
    yield made
    made.close()


def test_a_writer_that_does_not_go_is_named(ctx, monkeypatch):
    monkeypatch.setattr(context, "WRITER_WAIT_S", 0)
    with (
        only_writer(ctx.folder, lock_name=context.WRITER_LOCK),
        pytest.raises(CapacityError, match="another process"),
    ):
        ctx.open()
    ctx.open()


def test_a_file_in_the_run_folder_asks_to_stop(ctx):
    assert ctx.wish() == "go on"
    (ctx.folder / context.STOP).touch()
    assert ctx.wish() == "stop"


def test_each_notice_is_said_and_saves_once(ctx, told, monkeypatch):
    said = []
    monkeypatch.setattr(context, "say_to_driver", lambda folder, text: said.append((folder, text)))
    wishes = []
    in_a_minute = int((time.time() + 61) * 1000)
    for info in (None, PreemptionInfo(in_a_minute, {"n1": [1]}), PreemptionInfo(None, {"n1": [1], "n2": [0, 3]})):
        told.preemption_context.preemption_info = info
        wishes += [ctx.wish(), ctx.wish()]
    assert wishes == ["go on", "go on", "save", "go on", "save", "go on"]
    assert [folder for folder, _ in said] == [ctx.folder] * 2
    assert "worker 1 is taken away in 1 min" in said[0][1] and "worker 0, 1, 3 is taken away soon" in said[1][1]


@pytest.mark.parametrize(("workers", "asked"), [(2, 2), ({"min": 1, "max": 4, "resize_interval_s": 5}, (1, 4))])
def test_a_range_is_handed_to_ray_train_as_one(tmp_path, workers, asked):
    scaling = train._scaling(tiny_job(tmp_path, tmp_path, tmp_path, resources={"workers": workers}).resources)
    assert scaling.num_workers == asked
    assert scaling.elastic_resize_monitor_interval_s == (60 if asked == 2 else 5)


def test_a_range_beyond_the_cluster_is_said(tmp_path, monkeypatch, capfd):
    nodes = ClusterResources((Node("head", 0, 0, 1e9), Node("a", 2, 0, 1e9)))
    for module in (train, cluster):
        monkeypatch.setattr(module, "cluster_resources", lambda: nodes)
    for workers in (2, {"min": 1, "max": 2}, {"min": 1, "max": 3}):
        job = train.placed(tiny_job(tmp_path, tmp_path, tmp_path, resources={"workers": workers}))
        assert job.resources.cpus_per_worker == 1, "a head without cores counts for nothing"
        train._say_room(job.resources)
    assert capfd.readouterr().err == "note: 1 to 3 workers, room for 2 now; the run grows as machines come\n"
    with pytest.raises(CapacityError, match="at least 3 worker"):
        train.placed(tiny_job(tmp_path, tmp_path, tmp_path, resources={"workers": {"min": 3, "max": 4}}))


class DyingTrainer:
    def __init__(self, deaths: int):
        self.deaths = deaths

    def fit(self):
        if self.deaths:
            self.deaths -= 1
            raise ActorDiedError
        return "result"


@pytest.mark.parametrize("deaths", [2, 3])
def test_the_run_outlasts_as_many_controllers_as_failures_are_allowed(tmp_path, monkeypatch, capfd, deaths):
    job, trainer = tiny_job(tmp_path, tmp_path, tmp_path, resources={"max_failures": 2}), DyingTrainer(deaths)
    monkeypatch.setattr(train, "_trainer", lambda *_: trainer)
    monkeypatch.setattr(train, "placement_group_table", dict)
    monkeypatch.setattr(train, "_free_bundles", lambda taken: None)
    if deaths == 2:
        assert train._outlasting_controllers(job, tmp_path) == "result"
    else:
        with pytest.raises(RemoteError, match="lost its controller") as caught:
            train._outlasting_controllers(job, tmp_path)
        assert "same command goes on" in str(caught.value)
    assert capfd.readouterr().err.count("the run's controller died") == 2


@pytest.mark.parametrize(
    ("left", "failure", "expected", "said"),
    [
        (True, ActorDiedError(), HangError, "rank 1 of 2 at step 7, its batches: no progress for 20.0 s"),
        (False, ActorDiedError(), ray.train.WorkerGroupError, "the workers died"),
        (True, CapacityError("resources", "are gone"), ray.train.WorkerGroupError, "the workers died"),
    ],
)
def test_workers_that_hung_until_no_failure_was_left_are_an_error_of_that(
    tmp_path, monkeypatch, left, failure, expected, said
):
    def fails(job, folder):
        raise ray.train.WorkerGroupError("the workers died", {1: failure})

    if left:
        head = "rank 1 of 2 at step 7, its batches: no progress for 20.0 s"
        (tmp_path / "stacks-1.txt").write_text(f"{head}\n\nThread\n", encoding="utf-8")
    monkeypatch.setattr(train, "_outlasting_controllers", fails)
    with pytest.raises(expected, match=said) as caught:
        train._fit(tiny_job(tmp_path, tmp_path, tmp_path), tmp_path)
    assert expected is not HangError or str(tmp_path / "stacks-1.txt") in str(caught.value)


def test_a_store_that_is_away_cannot_be_asked_to_stop(tmp_path):
    with pytest.raises(CheckpointError, match="end unasked"):
        train._ask_to_stop(tmp_path / "away")
