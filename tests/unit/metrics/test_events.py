"""The event log holds every report once, whatever happened to the process that wrote it."""

from __future__ import annotations

import json
import os

import pytest

from lmray.metrics.events import EventLog, metrics_of, read_attempts, read_events


def steps(log: EventLog) -> list[int]:
    return [event["step"] for event in read_events(log.path)]


def test_a_report_is_one_line_that_can_be_read_at_once(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.append(1, {"train.loss": 0.5})
    (line,) = log.path.read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["train.loss"] == 0.5
    log.append(2, {"train.loss": 0.25})
    first, second = read_events(log.path)
    assert (first["step"], second["step"]) == (1, 2)
    assert first["time"] <= second["time"]


def test_no_file_holds_no_events(tmp_path):
    assert read_events(tmp_path / "events.jsonl") == []


def resumed(log: EventLog, after_step: int, *, world_size: int = 1) -> EventLog:
    """The log of the attempt after that of `log`."""
    again = EventLog(log.path)
    again.begin_attempt(after_step, world_size=world_size)
    return again


def test_an_attempt_drops_what_was_reported_but_never_committed(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    for step in range(1, 6):
        log.append(step, {"train.loss": 1.0 / step})
    before = read_events(log.path)
    log = resumed(log, 3)
    assert read_events(log.path) == before[:3]
    log.append(4, {"train.loss": 9.0})
    assert steps(log) == [1, 2, 3, 4]
    assert steps(resumed(log, 0)) == []


def test_an_attempt_of_a_run_without_a_log_makes_an_empty_one(tmp_path):
    log = resumed(EventLog(tmp_path / "events.jsonl"), 3)
    assert log.path.is_file() and steps(log) == []


def test_events_say_their_attempt_and_what_is_done_again_however_often_a_run_is_killed(tmp_path):
    log = resumed(EventLog(tmp_path / "events.jsonl"), 0, world_size=2)
    for step in (1, 2, 3, 4, 5):
        log.append(step, {})
    log = resumed(log, 2, world_size=3)
    log.append(3, {})  # committed nothing: its line is dropped, and that 5 was reached before it is not forgotten
    log = resumed(log, 2, world_size=1)
    for step in (3, 4, 5, 6):
        log.append(step, {"train.loss": 1.0})
    found = read_events(log.path)
    assert [(one["step"], one["attempt"], one["world_size"]) for one in found] == [
        *((step, 1, 2) for step in (1, 2)),
        *((step, 3, 1) for step in (3, 4, 5, 6)),
    ]
    assert [one["step"] for one in found if one.get("replayed")] == [3, 4, 5]
    assert [(one.attempt, one.after_step, one.world_size, one.reported) for one in read_attempts(tmp_path)] == [
        *((1, 0, 2, 0), (2, 2, 3, 5), (3, 2, 1, 5))
    ]
    assert metrics_of(found[-1]) == {"train.loss": 1.0}, "the rest are no metrics"


def test_a_run_of_a_version_without_attempts_goes_on_with_its_second(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"step": 1, "time": 1.0}\n{"step": 2, "time": 2.0}\n', encoding="utf-8")
    log = resumed(EventLog(path), 1)
    log.append(2, {})
    first, second = read_events(path)
    assert "attempt" not in first and (second["attempt"], second["replayed"]) == (2, True)


@pytest.mark.parametrize("failing", [1, 2])
def test_an_attempt_that_begins_while_the_store_is_away_is_one_attempt(tmp_path, monkeypatch, failing):
    log = EventLog(tmp_path / "events.jsonl")
    for step in (1, 2):
        log.append(step, {})
    log = EventLog(log.path)
    replace, calls = os.replace, iter(range(1, 100))

    def away(source, target):
        if next(calls) == failing:
            raise OSError("away")
        replace(source, target)

    monkeypatch.setattr(os, "replace", away)
    with pytest.raises(OSError, match="away"):
        log.begin_attempt(1, world_size=1)
    log.begin_attempt(1, world_size=1)
    log.append(2, {})
    assert [(one["step"], one["attempt"], one.get("replayed", False)) for one in log.read()] == [
        *((1, 1, False), (2, 2, True))
    ]
    assert len(read_attempts(tmp_path)) == 1


def test_a_line_cut_off_by_a_kill_is_left_out_and_costs_no_other_line(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.append(1, {"train.loss": 0.5})
    log.append(2, {"train.loss": 0.4})
    whole = log.path.read_bytes()
    log.path.write_bytes(whole[:-10])
    assert steps(log) == [1]
    log.append(3, {"train.loss": 0.3})
    assert steps(log) == [1, 3]
    log = resumed(log, 3)
    assert len(log.path.read_text(encoding="utf-8").splitlines()) == 2


def test_a_write_that_fails_half_way_leaves_each_line_once(tmp_path, monkeypatch):
    log = EventLog(tmp_path / "events.jsonl")
    log.append(1, {})
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
        log.add(2, {})
        log.flush(durable=True)  # the line is in the file, and nobody knows whether it is on the disk
    log.append(3, {})
    assert steps(log) == [1, 2, 3]
