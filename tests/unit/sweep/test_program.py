"""A sweep without Ray: trial jobs, what is read from disk, ranking, outcome, picture."""

from __future__ import annotations

import json

import pytest
import yaml

from lmray.config import Document, decode, dump
from lmray.errors import ConfigError
from lmray.job import SweepJob, load
from lmray.metrics.events import EventLog
from lmray.sweep.picture import plot_sweep
from lmray.sweep.program import (
    Trial,
    best_job,
    check_sweep,
    mark_failed,
    mark_stopped,
    open_trial,
    ranked,
    read_trials,
    rows,
    standing,
    trial_job,
    write_outcome,
)
from lmray.testing.jobs import tiny_job


@pytest.fixture
def make(tiny_model, tiny_data, tmp_path):
    def sweep(job=None, **fields):
        tree = dump(tiny_job(tiny_model, tiny_data, tmp_path / "store", output={"artifact": "関数"}, **(job or {})))
        space = {"adapter.r": {"choice": [2, 4]}, "train.learning_rate": {"loguniform": [1e-3, 1e-1]}}
        document = {"kind": "sweep", "name": "探索", "job": tree, "space": space, "objectives": {"eval.loss": "min"}}
        document |= {"storage": str(tmp_path / "store"), "scheduler": {"name": "asha", "grace_steps": 2}}
        return decode(SweepJob, Document("sweep", document | fields))

    return sweep


def test_a_trial_is_judged_by_its_held_out_loss_and_kept_nowhere(make):
    job = trial_job(make(), {"adapter.r": 2, "train.learning_rate": 0.05}, "ab12")
    assert (job.adapter.r, job.train.learning_rate, job.name) == (2, 0.05, "trial-ab12")
    assert job.output is None and job.evaluate.tasks == ()
    assert (job.train.eval_steps, job.train.save_steps) == (2, 2)


def test_without_a_scheduler_the_job_decides_when_it_evaluates(make):
    sweep = make(job={"train__eval_steps": 3}, scheduler={"name": "none"})
    assert trial_job(sweep, {"adapter.r": 2}, "ab12").train.eval_steps == 3


def test_trials_are_read_from_their_folders(make, tmp_path):
    folder = tmp_path / "run"
    for name, losses in (("a", [3.0, 2.0]), ("b", [4.0]), ("c", []), ("d", [1.0])):
        place = folder / "trials" / name
        open_trial(place, {"adapter.r": 2})
        for step, loss in enumerate(losses, 1):
            EventLog(place / "events.jsonl").append(step * 2, {"train.loss": 1.0, "eval.loss": loss})
    details = {"adapter": "x", "base": {}, "run_key": "k"}
    (folder / "trials/a/result.json").write_text(json.dumps({"metrics": {"eval.loss": 1.9}, "details": details}))
    mark_stopped(folder / "trials/b", 2)
    mark_failed(folder / "trials/c", "out of memory")
    found = {trial.id: trial for trial in read_trials(folder, "eval.loss")}
    assert {id: (one.state, one.objective, one.step) for id, one in found.items()} == {
        "a": ("finished", 1.9, 4),
        "b": ("stopped", 4.0, 2),
        "c": ("failed", None, 0),
        "d": ("unfinished", 1.0, 2),
    }
    assert found["a"].details == details and found["c"].error == "out of memory"


def trial(id, state="finished", objective=1.0, step=8, **values):
    return Trial(id, values or {"adapter.r": 2, "train.learning_rate": 0.01}, state, objective, step)


TRIALS = (
    trial("f", "failed", None, 0),
    trial("s4", "stopped", 0.5, 4),
    trial("s8", "stopped", 3.0, 8),
    trial("b", objective=2.0),
    trial("a", objective=1.0),
    trial("u", "unfinished", 0.1, 2),
)


def test_where_a_sweep_stands_is_how_many_trials_ended_and_the_best_of_the_finished(make, tmp_path):
    sweep = make(search={"name": "random", "num_trials": 5})
    assert standing(tmp_path, sweep).line(1.0) == "trials 0/5  1.0 s gone"
    for name, loss in (("a", 2.5), ("b", 1.5)):
        open_trial(tmp_path / "trials" / name, {})
        (tmp_path / "trials" / name / "result.json").write_text(json.dumps({"metrics": {"eval.loss": loss}}))
    for name, mark in (("c", lambda place: mark_stopped(place, 2)), ("d", lambda place: mark_failed(place, "no"))):
        mark(tmp_path / "trials" / name)
    open_trial(tmp_path / "trials" / "e", {})
    assert standing(tmp_path, sweep).line(1.0) == "trials 4/5  best eval.loss 1.5  1.0 s gone"


def test_finished_trials_come_first_then_those_that_came_far():
    assert [one.id for one in ranked(TRIALS, "min")] == ["a", "b", "s8", "s4", "u", "f"]
    assert [one.id for one in ranked(TRIALS, "max")][:2] == ["b", "a"]


def test_the_table_has_a_column_for_every_key():
    head, body = rows(ranked(TRIALS, "min"))
    assert head == ["#", "trial", "state", "step", "objective", "adapter.r", "train.learning_rate"]
    assert body[0] == ["1", "a", "finished", "8", "1", "2", "0.01"] and body[-1][4] == "-"


def test_trials_look_for_kept_models_where_the_sweep_is_kept(make):
    sweep = make().model_copy(update={"storage": "/there"})
    inside = sweep.job.model_copy(update={"storage": None})
    assert trial_job(sweep.model_copy(update={"job": inside}), {}, "ab12").storage == "/there"
    own = sweep.job.model_copy(update={"storage": "/own"})
    assert trial_job(sweep.model_copy(update={"job": own}), {}, "ab12").storage == "/own"


def test_the_outcome_holds_a_best_job_that_runs_as_it_is(make, tmp_path):
    sweep, folder = make(), tmp_path / "run"
    best = trial("a", **{"adapter.r": 4, "train.learning_rate": 0.02})
    write_outcome(folder, sweep, [best, trial("s", "stopped")], status="succeeded", artifact="関数@1")
    job = load(folder / "best.yaml")
    assert job == best_job(sweep, best)
    assert (job.name, job.adapter.r, job.train.learning_rate) == ("探索-best", 4, 0.02)
    assert job.output == sweep.job.output and job.storage == sweep.job.storage
    written = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    assert written["best"] == "a" and [one["id"] for one in written["trials"]] == ["a", "s"]


def test_no_finished_trial_leaves_no_best_job(make, tmp_path):
    write_outcome(tmp_path, make(), [trial("s", "stopped")], status="stopped", artifact=None)
    assert not (tmp_path / "best.yaml").exists()
    assert json.loads((tmp_path / "sweep.json").read_text())["best"] is None


def test_a_trial_runs_on_one_worker(make, tmp_path):
    with pytest.raises(ConfigError, match="one worker, not 2") as caught:
        check_sweep(make(job={"resources": {"workers": 2}}), tmp_path)
    with pytest.raises(ConfigError, match="not 1 to 2"):
        check_sweep(make(job={"resources": {"workers": {"min": 1, "max": 2}}}), tmp_path)
    assert "max_concurrent_trials" in str(caught.value)


def test_a_job_without_held_out_data_cannot_be_judged(make, tmp_path):
    with pytest.raises(ConfigError, match="no trial can be judged"):
        check_sweep(make(job={"data__eval": None}), tmp_path)


def test_the_same_name_with_other_content_is_refused(make, tmp_path):
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(dump(make())))
    check_sweep(make(max_concurrent_trials=5, job={"name": "other"}), tmp_path)
    with pytest.raises(ConfigError, match=r"another job\.train\.max_steps, search\.num_trials") as caught:
        check_sweep(make(search={"num_trials": 3}, job={"train__max_steps": 99}), tmp_path)
    assert "another `name`" in str(caught.value)
    (tmp_path / "job.yaml").write_text("job: {name: [", encoding="utf-8")
    with pytest.raises(ConfigError, match="is spoilt"):
        check_sweep(make(), tmp_path)


@pytest.mark.draws
@pytest.mark.parametrize("trials", [TRIALS, (), (trial("s", "stopped"),)], ids=["all", "none", "one stopped"])
def test_the_picture_is_drawn_whatever_there_is(make, tmp_path, trials):
    path = tmp_path / "sweep.png"
    plot_sweep(path, make(), ranked(trials, "min"))
    assert path.read_bytes().startswith(b"\x89PNG")
