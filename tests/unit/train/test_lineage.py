"""However often a run is killed: in the events that stand in the end, every sample of the stream stands once."""

from __future__ import annotations

from collections import defaultdict

import pytest

from lmray.artifacts.store import run_folder
from lmray.context import LocalContext
from lmray.data.sampler import Sampler
from lmray.metrics.events import read_events
from lmray.testing.jobs import curve, run_here, tiny_job
from lmray.testing.kills import Killed
from lmray.train.loop import Loop
from lmray.train.record import read_record
from lmray.train.report import write_report


@pytest.fixture(params=[False, True], ids=["between steps", "beside steps"])
def killed(request, tiny_model, tiny_data, tmp_path, monkeypatch):
    """A run of eight steps that is saved at 3 and 6 and killed after the steps given, and then ends; its job, and the
    rows that each attempt was given, by attempt and where in the stream their step begins."""
    report, fed = LocalContext.report, defaultdict(list)
    place: list[int] = []
    made, batch = Loop._made, Loop._batch

    def run(*steps: int):
        settings = {"train__max_steps": 8, "train__save_steps": 3, "evaluate": {"tasks": []}}
        settings["resources"] = {"async_checkpoints": request.param}
        job = tiny_job(tiny_model, tiny_data, tmp_path / "store", name=f"killed-{len(steps)}", **settings)
        for attempt, kill in enumerate([*steps, None], 1):

            def dies(self, step, metrics, *, at=kill):
                report(self, step, metrics)
                if step == at:
                    raise Killed

            def begins(self, start, *, now=attempt):
                place[:] = [now, start]  # one thread makes all batches
                return made(self, start)

            def feeds(self, source, rows):
                fed[tuple(place)].extend(rows)
                return batch(self, source, rows)

            monkeypatch.setattr(LocalContext, "report", dies)
            monkeypatch.setattr(Loop, "_made", begins)
            monkeypatch.setattr(Loop, "_batch", feeds)
            if kill is None:
                assert run_here(job, tmp_path / "scratch").status == "succeeded"
            else:
                with pytest.raises(Killed):
                    run_here(job, tmp_path / "scratch")
        return job, fed

    return run


def test_steps_that_are_done_again_are_flagged_and_every_sample_stands_once(killed):
    job, fed = killed(5, 4, 7)
    events = read_events(run_folder(job) / "events.jsonl")
    assert [(event["step"], event["attempt"]) for event in events] == [
        *((step, 1) for step in (1, 2, 3)),
        *((step, 3) for step in (4, 5, 6)),
        *((step, 4) for step in (7, 8)),
    ]
    assert [event["step"] for event in events if event.get("replayed")] == [4, 5, 7]
    assert {event["world_size"] for event in events} == {1}
    ends = [event["train.samples"] for event in events]
    assert ends == list(range(4, 33, 4))
    stream, place = Sampler(read_record(run_folder(job)).plan.data["rows"], job.train.seed), 0
    for event in events:
        took = fed[event["attempt"], place]
        assert took == stream.rows(place, event["train.samples"]), event
        place = event["train.samples"]


def test_a_run_that_nobody_killed_has_one_attempt_and_does_nothing_again(killed):
    job, _ = killed()
    events = read_events(run_folder(job) / "events.jsonl")
    assert {event["attempt"] for event in events} == {1} and not any("replayed" in event for event in events)
    assert "attempts: from" not in write_report(run_folder(job)).read_text(encoding="utf-8")


def test_the_report_says_where_a_run_went_on(killed):
    job, _ = killed(2, 5, 4)
    text = write_report(run_folder(job)).read_text(encoding="utf-8")
    starts = ("from the start", "from the start", "after step 3", "after step 3")
    assert f"4 attempts: {', '.join(f'{start} (workers: 1)' for start in starts)}." in text
    assert "Steps that were done again: 4" in text
    assert len(curve(job)) == 8
