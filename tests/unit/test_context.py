"""The context of a program that runs in this process: reports, commits, resumes, waits for its store."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest

from lmray.artifacts.checkpoints import checkpoint_name, committed
from lmray.artifacts.files import MANIFEST, read_sealed
from lmray.artifacts.patience import Patience
from lmray.context import LocalContext, Result, RunContext
from lmray.errors import CheckpointError
from lmray.metrics.events import read_events


@pytest.fixture
def ctx(tmp_path) -> LocalContext:
    return LocalContext(tmp_path / "run", scratch=tmp_path / "scratch")


def save(ctx: LocalContext, step: int, metrics: dict[str, float] | None = None) -> None:
    """Reports `step` and commits a checkpoint of it."""
    ctx.report(step, metrics or {})
    folder = ctx.scratch / checkpoint_name(step)
    folder.mkdir()
    (folder / "weights").write_text(str(step), encoding="utf-8")
    ctx.commit(step, folder, run_key="key")


def test_it_is_a_run_context_of_one_process(ctx):
    port: RunContext = ctx
    assert (port.rank, port.world_size, port.device, port.threads) == (0, 1, "cpu", 1)
    assert port.folder.is_dir()
    assert port.scratch.is_dir()
    assert port.resume_from() is None


def test_a_report_is_in_the_event_log_when_the_call_returns(ctx):
    ctx.report(1, {"train.loss": 0.5})
    (event,) = read_events(ctx.folder / "events.jsonl")
    assert (event["step"], event["train.loss"]) == (1, 0.5)


def test_a_checkpoint_is_committed_when_the_call_returns(ctx):
    save(ctx, 5)
    found = ctx.resume_from()
    assert found == ctx.folder / "checkpoint-00000005"
    assert (found / "weights").read_text(encoding="utf-8") == "5"
    manifest = read_sealed(found)
    assert (manifest["step"], manifest["run_key"]) == (5, "key")


def test_the_last_two_checkpoints_stay_in_the_order_of_steps(ctx):
    for step in (5, 10, 100):
        save(ctx, step)
    assert [path.name for path in committed(ctx.folder)] == ["checkpoint-00000010", "checkpoint-00000100"]
    assert ctx.resume_from() == ctx.folder / "checkpoint-00000100"


def test_a_folder_without_manifest_was_not_committed(ctx):
    save(ctx, 5)
    shutil.copytree(ctx.folder / checkpoint_name(5), ctx.folder / checkpoint_name(10))
    (ctx.folder / checkpoint_name(10) / MANIFEST).unlink()
    assert ctx.resume_from() == ctx.folder / "checkpoint-00000005"


def test_a_new_context_on_the_folder_of_a_run_goes_on_with_it(ctx, tmp_path):
    save(ctx, 5, {"train.loss": 0.5})
    again = LocalContext(ctx.folder, scratch=tmp_path / "other")
    assert again.resume_from() == ctx.resume_from()
    again.report(6, {})
    assert [event["step"] for event in read_events(ctx.folder / "events.jsonl")] == [5, 6]


def test_a_program_is_asked_to_stop_by_whoever_started_it(tmp_path):
    asked = []
    ctx = LocalContext(tmp_path / "run", scratch=tmp_path / "scratch", stop=lambda: bool(asked))
    assert ctx.wish() == "go on"
    asked.append(True)
    assert ctx.wish() == "stop"


def test_a_result_is_one_json_object():
    plain = Result("succeeded", "run", "calls@123456789abc", {"eval.loss": 0.5}, 1.23456)
    assert json.loads(json.dumps(plain.to_json())) == {
        "status": "succeeded",
        "run": "run",
        "artifact": "calls@123456789abc",
        "metrics": {"eval.loss": 0.5},
        "seconds": 1.235,
    }
    assert Result("failed", "run", details={"trials": 3}).to_json()["details"] == {"trials": 3}


class Store:
    """A run folder that can be taken away, and a clock that only waiting moves."""

    def __init__(self, tmp_path: Path):
        self.now, self.said, self.returns_at = 0.0, [], float("inf")
        self.folder, self.elsewhere = tmp_path / "run", tmp_path / "elsewhere"
        patience = Patience(say=self.said.append, clock=lambda: self.now, sleep=self.sleep)
        self.ctx = LocalContext(self.folder, scratch=tmp_path / "scratch", patience=patience)

    def take_away(self) -> None:
        self.folder.rename(self.elsewhere)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now >= self.returns_at and self.elsewhere.exists():
            self.elsewhere.rename(self.folder)

    def steps(self) -> list[int]:
        return [event["step"] for event in read_events(self.folder / "events.jsonl")]


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path)


def test_steps_go_on_while_the_store_is_away_and_no_event_is_missing(store):
    store.ctx.report(1, {})
    store.take_away()
    store.ctx.report(2, {})
    store.ctx.report(3, {})
    store.elsewhere.rename(store.folder)
    store.ctx.report(4, {})
    assert store.steps() == [1, 2, 3, 4]
    assert len(store.said) == 2 and "No such file" in store.said[0] and "no line is missing" in store.said[1]
    assert store.now == 0


def test_steps_that_waited_for_the_store_are_not_written_once_an_attempt_does_them_again(store):
    save(store.ctx, 1)
    store.take_away()
    store.ctx.report(2, {})
    store.elsewhere.rename(store.folder)
    store.ctx.resume_from()
    store.ctx.report(2, {})
    assert store.steps() == [1, 2]


def test_a_checkpoint_waits_for_the_store_and_is_then_whole(store):
    save(store.ctx, 1)
    store.take_away()
    store.returns_at = 60
    store.ctx.report(2, {})
    save(store.ctx, 3)
    assert store.steps() == [1, 2, 3]
    assert store.ctx.resume_from() == store.folder / "checkpoint-00000003"
    assert len(store.said) == 3 and store.now >= 60


def test_a_store_that_stays_away_ends_the_run_and_names_what_is_safe(store):
    save(store.ctx, 1)
    store.take_away()
    with pytest.raises(CheckpointError, match="checkpoint-00000001 is good") as caught:
        save(store.ctx, 2)
    assert "same command goes on" in str(caught.value) and not store.folder.exists(), "nothing is made in its place"
    store.elsewhere.rename(store.folder)
    assert store.ctx.resume_from() == store.folder / "checkpoint-00000001"


def test_a_full_disk_half_way_through_a_checkpoint_leaves_no_half(store, monkeypatch):
    save(store.ctx, 1)

    def full(source, target):
        target.mkdir()
        (target / "weights").write_bytes(b"half")
        raise shutil.Error([(source, target, "[Errno 28] No space left on device")])

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="No space left"):
        patch.setattr(shutil, "copytree", full)
        save(store.ctx, 2)
    assert [path.name for path in committed(store.folder)] == ["checkpoint-00000001"]
    assert not list(store.folder.glob(".*.tmp"))
    assert store.ctx.resume_from() == store.folder / "checkpoint-00000001"


def test_nobody_asks_to_stop_through_a_store_that_is_away(tmp_path):
    def away() -> bool:
        raise OSError(errno.ESTALE, "Stale file handle")

    assert not LocalContext(tmp_path / "run", scratch=tmp_path / "scratch", stop=away).asked_to_stop()


def test_an_error_of_the_event_log_that_no_waiting_mends_is_raised(ctx):
    (ctx.folder / "events.jsonl").mkdir()
    with pytest.raises(IsADirectoryError):
        ctx.report(1, {})
