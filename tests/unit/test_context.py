"""The context of a program that runs in this process: reports, commits, resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmray.artifacts.files import seal
from lmray.context import LocalContext, Result, RunContext, checkpoint_name, committed
from lmray.metrics.events import read_events


@pytest.fixture
def ctx(tmp_path) -> LocalContext:
    return LocalContext(tmp_path / "run", scratch=tmp_path / "scratch")


def checkpoint(ctx: LocalContext, step: int, *, sealed: bool = True) -> Path:
    folder = ctx.scratch / checkpoint_name(step)
    folder.mkdir()
    (folder / "weights").write_text(str(step), encoding="utf-8")
    if sealed:
        seal(folder, step=step)
    return folder


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
    ctx.report(5, {}, checkpoint(ctx, 5))
    found = ctx.resume_from()
    assert found == ctx.folder / "checkpoint-00000005"
    assert (found / "weights").read_text(encoding="utf-8") == "5"


def test_the_last_two_checkpoints_stay_in_the_order_of_steps(ctx):
    for step in (5, 10, 100):
        ctx.report(step, {}, checkpoint(ctx, step))
    assert [path.name for path in committed(ctx.folder)] == ["checkpoint-00000010", "checkpoint-00000100"]
    assert ctx.resume_from() == ctx.folder / "checkpoint-00000100"


def test_a_folder_without_manifest_was_not_committed(ctx):
    ctx.report(5, {}, checkpoint(ctx, 5))
    ctx.report(10, {}, checkpoint(ctx, 10, sealed=False))
    assert ctx.resume_from() == ctx.folder / "checkpoint-00000005"


def test_a_new_context_on_the_folder_of_a_run_goes_on_with_it(ctx, tmp_path):
    ctx.report(5, {"train.loss": 0.5}, checkpoint(ctx, 5))
    again = LocalContext(ctx.folder, scratch=tmp_path / "other")
    assert again.resume_from() == ctx.resume_from()
    again.report(6, {})
    assert [event["step"] for event in read_events(ctx.folder / "events.jsonl")] == [5, 6]


def test_a_program_is_asked_to_stop_by_whoever_started_it(tmp_path):
    asked = []
    ctx = LocalContext(tmp_path / "run", scratch=tmp_path / "scratch", stop=lambda: bool(asked))
    assert not ctx.should_stop()
    asked.append(True)
    assert ctx.should_stop()


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
