"""`lmray evaluate`: what it says; the programs behind it have tests of their own."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

import lmray.on_ray.run
from lmray.artifacts.store import run_folder
from lmray.context import LocalContext
from lmray.evaluate.program import evaluate
from lmray.on_ray import evaluate as on_ray
from lmray.testing.tiny import tiny_adapter_folder


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Jobs run in this process; the list of them."""
    jobs = []

    def run(job, again=None):
        jobs.append(job)
        return evaluate(job, LocalContext(run_folder(job), scratch=tmp_path / "scratch"))

    monkeypatch.setattr(lmray.on_ray.run, "run", run)
    return jobs


@pytest.fixture
def compared(cli, here, tiny_model, tiny_data, tmp_path):
    """What is said of `base` beside an adapter."""
    adapter = tiny_adapter_folder(tiny_model, tmp_path / "tuned", seed=3)
    words = ["evaluate", "base", adapter, "--tasks", "loss,f1", "--data", tiny_data, "--split", "0.25", "--by", "topic"]
    words += ["--max-examples", "4", "--max-new-tokens", "4", "--name", "比較"]
    return lambda *more: cli(*words, *more)


def test_targets_side_by_side_with_intervals(compared, here):
    said = compared()
    assert said.code == 0, said.err
    head = next(line for line in said.out.splitlines() if "difference, 95 %" in line)
    assert head.split()[:2] == ["base", "tuned"]
    (row,) = [line for line in said.out.splitlines() if line.startswith("eval.loss ")]
    assert "[" in row and "]" in row
    assert "comparison.html" in said.err
    assert here[0].data.eval.by == "topic" and here[0].evaluate.max_new_tokens == 4


def test_as_json(compared):
    said = compared("--json")
    value = json.loads(said.out)
    assert value["status"] == "succeeded" and set(value["details"]["deltas"]["tuned"]) >= {"eval.loss", "eval.f1"}


def test_how_far_it_is_goes_to_stderr(cli, monkeypatch, tiny_model, tiny_data):
    """With what Ray does replaced by a call."""
    done = {"wait": lambda refs, timeout: (refs, []), "get": lambda result: result}
    monkeypatch.setattr(on_ray, "ray", SimpleNamespace(remote=lambda **_: _called_at_once, **done))
    monkeypatch.setattr(on_ray, "connected", nullcontext)
    monkeypatch.setattr(on_ray, "placed", lambda job: job)
    words = ["base", "--model", tiny_model, "--tasks", "f1", "--data", tiny_data, "--max-new-tokens", "2"]
    said = cli("evaluate", *words, "--max-examples", "3")
    assert said.code == 0, said.err
    assert "base: answers 3/3  " in said.err and "answers" not in said.out


def _called_at_once(function):
    return SimpleNamespace(remote=function)


def test_a_sheet_and_its_votes(compared, cli, tmp_path):
    compared()
    made = cli("evaluate", "--review", "比較", "--out", tmp_path / "sheet.html", "--seed", "4", "--json")
    assert made.code == 0, made.err
    assert json.loads(made.out)["questions"] == 4 and (tmp_path / "sheet.html").is_file()
    (path,) = (tmp_path / "store").rglob("review-key.json")
    key = json.loads(path.read_text(encoding="utf-8"))
    votes = tmp_path / "votes.json"
    listed = [
        {"question": number, "choice": "left" if label == "tuned" else "right"}
        for number, label in enumerate(key["left"], start=1)
    ]
    votes.write_text(json.dumps({"sheet": key["sheet"], "votes": listed}), encoding="utf-8")
    counted = cli("evaluate", "--votes", votes, "比較", "--json")
    assert json.loads(counted.out)["human_review"]["win_rate"] == 1.0
    assert "wins: 4" in cli("evaluate", "--votes", votes, "比較").out


def test_a_run_that_is_not_there(compared, cli, tmp_path):
    compared()
    said = cli("evaluate", "--review", "比較2")
    assert said.code == 2 and "neither a folder nor a run" in said.err and "did you mean `比較`" in said.err
    said = cli("evaluate", "--votes", tmp_path / "votes.json")
    assert said.code == 2 and "--votes: 0 runs given" in said.err


def test_an_interrupted_evaluation_leaves_as_a_run_does(cli, monkeypatch, tiny_data):
    def interrupted(job, again=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(lmray.on_ray.run, "run", interrupted)
    said = cli("evaluate", "base", "--model", "smollm2-135m", "--tasks", "loss", "--data", tiny_data)
    assert said.code == 130 and "comparison" not in said.err
