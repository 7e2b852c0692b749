"""The progress display: what it reads, what it says."""

from __future__ import annotations

import io
import json

from lmray.metrics.events import EventLog
from lmray.metrics.progress import EventTail, Steps, follow


def event(step, **metrics):
    return {"step": step, "time": 100.0 + 2.0 * step, "train.loss": 1.0 / step, **metrics}


def left_s(steps):
    standing = steps.standing()
    assert standing is not None
    return standing.left_s


def test_a_tail_gives_each_event_once(tmp_path):
    path = tmp_path / "events.jsonl"
    tail = EventTail(path)
    assert tail.new() == []
    log = EventLog(path)
    log.append(1, {"train.loss": 3.0})
    log.append(2, {"train.loss": 2.0})
    assert [one["step"] for one in tail.new()] == [1, 2]
    assert tail.new() == []
    with open(path, "a") as file:
        file.write('{"step": 3, "ti')  # a report that is being written
    assert tail.new() == []
    with open(path, "a") as file:
        file.write('me": 1.0}\n')
    assert [one["step"] for one in tail.new()] == [3]


def test_a_tail_starts_over_when_a_resumed_run_rewrote_the_log(tmp_path):
    path = tmp_path / "events.jsonl"
    log, tail = EventLog(path), EventTail(path)
    for step in (1, 2, 3):
        log.append(step, {})
    tail.new()
    log.begin_attempt(2, world_size=1)
    assert [one["step"] for one in tail.new()] == [1, 2]


def test_a_tail_passes_over_a_line_that_a_kill_cut_off_and_waits_for_a_store_that_is_away(tmp_path):
    path = tmp_path / "store" / "events.jsonl"
    path.parent.mkdir()
    log, tail = EventLog(path), EventTail(path)
    path.write_text('{"step": 1}\n{"step": 2, "ti', encoding="utf-8")
    assert [one["step"] for one in tail.new()] == [1]
    log.append(3, {})
    assert [one["step"] for one in tail.new()] == [3]
    path.parent.rename(tmp_path / "away")
    path.parent.write_text("a file where the folder was")
    assert tail.new() == []


def test_remaining_time_follows_the_pace_of_this_attempt():
    steps = Steps(total=11)
    steps.add([event(1)])
    assert left_s(steps) is None
    steps.add([event(2), event(6)])
    assert left_s(steps) == 10.0  # 5 steps took 10 s, 5 are left


def test_the_time_between_two_attempts_is_no_pace():
    steps = Steps(total=11)
    steps.add([event(1, attempt=1), event(2, attempt=1)])
    assert left_s(steps) == 18.0
    steps.add([{**event(3, attempt=2), "time": 5000.0}])
    assert left_s(steps) is None
    steps.add([{**event(5, attempt=2, replayed=True, world_size=2), "time": 5008.0}])
    assert left_s(steps) == 24.0
    assert not {"attempt", "replayed", "world_size"} & steps.latest.keys()


def test_a_line_says_step_loss_rate_speed_and_times():
    steps = Steps(total=20)
    steps.add([event(1), event(10, **{"train.learning_rate": 2e-4, "train.tokens_per_s": 3456.7, "eval.loss": 1.5})])
    standing = steps.standing()
    assert standing and standing.line(elapsed_s=65.0) == (
        "step 10/20  loss 0.1000  held out 1.5000  lr 2.00e-04  3,457 tokens/s  1 min 05 s gone, 20.0 s left"
    )


def test_follow_shows_where_a_run_ended(tmp_path):
    stream = io.StringIO()
    (tmp_path / "plan.json").write_text(json.dumps({"steps": 2}))
    with follow(tmp_path, stream=stream):
        log = EventLog(tmp_path / "events.jsonl")
        log.append(1, {"train.loss": 3.0})
        log.append(2, {"train.loss": 2.5})
    assert stream.getvalue().splitlines()[-1].startswith("step 2/2  loss 2.5000")


def test_follow_says_nothing_of_a_run_that_reported_nothing(tmp_path):
    stream = io.StringIO()
    with follow(tmp_path, stream=stream):
        pass
    assert stream.getvalue() == ""
