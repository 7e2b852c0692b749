"""Trackers that fail, hang or are not installed: the training never notices."""

from __future__ import annotations

import json
import threading

import pytest

from lmray.artifacts.store import run_folder
from lmray.errors import ConfigError
from lmray.testing.jobs import curve, run_here, tiny_job
from lmray.trackers import base
from lmray.trackers.tensorboard import Tensorboard
from lmray.train import tracking
from lmray.train.plan import make_plan


@pytest.fixture
def job(tiny_model, tiny_data, tmp_path):
    def make(**changes):
        return tiny_job(tiny_model, tiny_data, tmp_path / "store", **{"report_to": ["tensorboard"], **changes})

    return make


def test_a_tracker_that_fails_is_named_once_and_the_run_goes_on(job, tmp_path, monkeypatch, capsys):
    def broken(self, run, *, session_id, after):
        raise OSError("no route to host")

    monkeypatch.setattr(Tensorboard, "open", broken)
    assert run_here(job(), tmp_path / "scratch").status == "succeeded"
    said = capsys.readouterr().err
    assert said.count("tracker `tensorboard` failed, the run goes on without it: OSError: no route to host") == 1


def test_a_tracker_that_hangs_holds_the_end_up_for_so_long_only(job, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Tensorboard, "open", lambda *a, **k: threading.Event().wait())
    monkeypatch.setattr(tracking, "END_S", 0.0)
    assert run_here(job(), tmp_path / "scratch").status == "succeeded"
    assert len(curve(job())) == 6
    assert "has not answered" in capsys.readouterr().err


def test_a_package_that_is_not_there_is_found_before_anything_is_written(job, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    one = job(report_to=["tensorboard", "mlflow"])
    with pytest.raises(ConfigError, match="`mlflow` needs the package `mlflow`") as caught:
        make_plan(one)
    assert "lmray[trackers]" in str(caught.value) and not run_folder(one).exists()
    make_plan(job())


def test_trackers_are_no_part_of_a_runs_identity(job):
    assert make_plan(job()).run_key == make_plan(job(report_to=[])).run_key


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (["tensorbord"], "did you mean `tensorboard`"),
        (["mlflow", "mlflow"], "names a tracker twice"),
        ([{"name": "mlflow", "tracking_uri": "https://me:secret@host"}], "MLFLOW_TRACKING_PASSWORD"),
        ([{"name": "wandb", "api_key": "x"}], "unknown key"),
    ],
)
def test_what_is_wrong_with_report_to_is_said(job, value, found):
    with pytest.raises(ConfigError, match=found):
        job(report_to=value)


def test_how_far_a_tracker_was_told_is_kept(job, tmp_path):
    run_here(job(), tmp_path / "scratch", stop_at=3)
    path = run_folder(job()) / "trackers" / "tensorboard.json"
    assert json.loads(path.read_text(encoding="utf-8"))["step"] == 3
    run_here(job(), tmp_path / "scratch")
    told = json.loads(path.read_text(encoding="utf-8"))
    assert told["step"] == 6 and told["ended"] is True
