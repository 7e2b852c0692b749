"""`lmray report`: one run's page again, or several beside each other."""

from __future__ import annotations

import json

import pytest

from lmray.artifacts.store import run_folder
from lmray.testing.jobs import run_here, tiny_job


@pytest.fixture
def runs(tiny_model, tiny_data, tmp_path):
    """Two finished runs that differ in two keys, in the store that commands look in."""
    evaluate = {"tasks": ["json_match", "loss"], "max_new_tokens": 3, "max_examples": 2, "base": False}
    made = []
    for name, changes in (("速い", {}), ("slow", {"train__learning_rate": 0.001, "adapter__r": 2})):
        one = tiny_job(tiny_model, tiny_data, tmp_path / "store", name=name, evaluate=evaluate, **changes)
        run_here(one, tmp_path / "scratch")
        made.append(one)
    return made


def test_two_runs_beside_each_other(cli, runs, tmp_path):
    page = tmp_path / "比較.html"
    said = cli("report", "速い", str(run_folder(runs[1])), "--out", page, "--json")
    assert said.code == 0, said.err
    value = json.loads(said.out)
    assert [run["label"] for run in value["runs"]] == ["速い", "slow"]
    assert value["differences"] == {"adapter.r": [4, 2], "train.learning_rate": [0.01, 0.001]}
    losses = [run["metrics"]["eval.loss"] for run in value["runs"]]
    assert losses[0] < losses[1] and value["best"]["eval.loss"] == ["速い"]
    assert "train.steps" not in value["best"] and "model.parameters" not in value["best"]
    text = page.read_text(encoding="utf-8")
    assert value["report"] == str(page) and "速い" in text and "adapter.r" in text and "expected" in text
    assert text.count("data:image/png;base64,") == 4 and 'src="http' not in text


def test_the_table_marks_the_best_and_names_what_differs(cli, runs):
    said = cli("report", "速い", "slow")
    lines = {line.split()[0]: line for line in said.out.splitlines() if line}
    assert said.code == 0 and lines["eval.loss"].count("*") == 1
    assert lines["eval.loss"].index("*") < lines["eval.loss"].rindex("nats"), "the first run is the better one"
    assert lines["adapter.r"].split() == ["adapter.r", "4", "2"]
    assert "*" not in lines["train.steps"]


def test_the_report_of_one_run_is_written_again(cli, runs):
    page = run_folder(runs[0]) / "report.html"
    page.unlink()
    said = cli("report", "速い")
    assert said.code == 0 and page.is_file() and str(page) in said.err
    assert "eval.loss" in said.out and "what differs" not in said.out


def test_a_run_that_was_stopped_is_compared_with_a_finished_one(cli, runs, tmp_path):
    halved = runs[0].changed({"name": "halved", "train.max_steps": 20})
    run_here(halved, tmp_path / "scratch", stop_at=2)
    said = cli("report", "halved", "slow", "--json")
    value = json.loads(said.out)
    assert [run["status"] for run in value["runs"]] == ["not finished, step 2 of 20", "succeeded"]
    assert value["report"] is None and value["differences"]["train.max_steps"] == [20, 6]
    assert "eval.loss" not in value["best"], "one value has nothing to be better than"


def test_the_same_name_in_two_stores_is_told_apart_by_folder(cli, runs, tmp_path):
    other = runs[0].changed({"storage": str(tmp_path / "other")})
    run_here(other, tmp_path / "scratch", stop_at=1)
    value = json.loads(cli("report", "速い", run_folder(other), "--json").out)
    assert [run["label"] for run in value["runs"]] == [str(run_folder(runs[0])), str(run_folder(other))]
    assert value["differences"] == {}


def test_wrong_input_is_named(cli, runs, tmp_path):
    said = cli("report", "nothing")
    assert said.code == 2 and "is no training run" in said.err and "name in the store" in said.err
    said = cli("report", "slow", "--out", tmp_path / "x.html")
    assert said.code == 2 and "two or more" in said.err
