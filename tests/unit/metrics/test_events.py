"""The event log holds every report once, whatever happened to the process that wrote it."""

from __future__ import annotations

import json
import os

import pytest

from lmray.metrics.events import EventLog, read_events


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


def test_truncate_drops_what_was_reported_but_never_committed(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    for step in range(1, 6):
        log.append(step, {"train.loss": 1.0 / step})
    before = read_events(log.path)
    log.truncate_after(3)
    assert read_events(log.path) == before[:3]
    log.append(4, {"train.loss": 9.0})
    assert steps(log) == [1, 2, 3, 4]
    log.truncate_after(0)
    assert steps(log) == []


def test_truncate_of_a_log_that_is_not_there_makes_an_empty_one(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.truncate_after(3)
    assert steps(log) == []


def test_a_line_cut_off_by_a_kill_is_left_out_and_costs_no_other_line(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.append(1, {"train.loss": 0.5})
    log.append(2, {"train.loss": 0.4})
    whole = log.path.read_bytes()
    log.path.write_bytes(whole[:-10])
    assert steps(log) == [1]
    log.append(3, {"train.loss": 0.3})
    assert steps(log) == [1, 3]
    log.truncate_after(3)
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
