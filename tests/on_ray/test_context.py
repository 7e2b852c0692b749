"""What a worker's context adds to that of any group, and what the driver outlasts. No cluster needed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import ray.train
from ray.exceptions import ActorDiedError

from lmray.artifacts.files import only_writer
from lmray.errors import CapacityError, CheckpointError, HangError, RemoteError
from lmray.on_ray import context, train
from lmray.on_ray.context import RayContext
from lmray.testing.jobs import tiny_job


@pytest.fixture
def ctx(tmp_path, monkeypatch):
    place = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(ray.train, "get_context", lambda: place)
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
    assert not ctx.should_stop()
    (ctx.folder / context.STOP).touch()
    assert ctx.should_stop()


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
