"""What a worker's context adds to the local one: ranks that agree; and what the driver outlasts. No cluster needed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import ray.train
import ray.train.collective
from ray.exceptions import ActorDiedError

from lmray.artifacts.files import only_writer, seal
from lmray.errors import CapacityError, CheckpointError, RemoteError
from lmray.metrics.events import read_events
from lmray.on_ray import context, train
from lmray.on_ray.context import RayContext
from lmray.testing.jobs import tiny_job


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    """Two ranks of a group; what rank 0 sends is what rank 1 gets."""
    sent = []

    def broadcast(outcome):
        if outcome is not None:
            sent.append(outcome)
        return sent[-1]

    def make(rank: int) -> RayContext:
        place = SimpleNamespace(get_world_rank=lambda: rank, get_world_size=lambda: 2)
        monkeypatch.setattr(ray.train, "get_context", lambda: place)
        return RayContext(tmp_path / "run", device="cpu", threads=1)

    monkeypatch.setattr(ray.train.collective, "broadcast_from_rank_zero", broadcast)
    made = make(0), make(1)
    yield made
    for one in made:
        one.close()


def checkpoint(ctx: RayContext):
    folder = ctx.scratch / "checkpoint"
    folder.mkdir()
    (folder / "weights").write_bytes(b"")
    seal(folder)
    return folder


def test_rank_0_writes_and_every_rank_goes_on_from_the_same_checkpoint(ranks):
    first, second = ranks
    for ctx in ranks:
        ctx.report(1, {})
    source = checkpoint(first)
    for ctx in ranks:
        ctx.report(2, {}, source)
    assert [event["step"] for event in read_events(first.folder / "events.jsonl")] == [1, 2]
    assert first.resume_from() == second.resume_from() == first.folder / "checkpoint-00000002"


def test_what_fails_on_rank_0_is_raised_on_every_rank(ranks):
    first, _ = ranks
    source = checkpoint(first)
    first.report(1, {}, source)
    (first.folder / "checkpoint-00000001" / "weights").write_bytes(b"x")
    for ctx in ranks:
        with pytest.raises(CheckpointError, match="no checkpoint of this run is good"):
            ctx.resume_from()


def test_a_writer_that_does_not_go_is_named(ranks, monkeypatch):
    first, second = ranks
    monkeypatch.setattr(context, "WRITER_WAIT_S", 0)
    second.open()  # only rank 0 writes
    with (
        only_writer(first.folder, lock_name=context.WRITER_LOCK),
        pytest.raises(CapacityError, match="another process"),
    ):
        first.open()
    first.open()


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


def test_a_store_that_is_away_cannot_be_asked_to_stop(tmp_path):
    with pytest.raises(CheckpointError, match="end unasked"):
        train._ask_to_stop(tmp_path / "away")
