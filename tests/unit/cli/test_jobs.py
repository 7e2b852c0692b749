"""`lmray submit` and `lmray jobs`, with a cluster that is only pretended."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

import lmray.on_ray.jobs
from lmray.context import Result
from lmray.errors import ConfigError, RemoteError


def record(id="run-1", status="RUNNING", **fields):
    """What Ray knows of a job."""
    facts = {"submission_id": id, "message": None, "start_time": 1_700_000_000_000, "end_time": 1_700_000_065_000}
    facts |= {
        "metadata": {"lmray.kind": "train", "lmray.name": "関数"},
        "status": SimpleNamespace(value=status),
        **fields,
    }
    return SimpleNamespace(**facts)


class FakeRun:
    def __init__(self, id="run-1", outcome=None):
        self.id, self.outcome, self.stopped = id, outcome or Result("succeeded", "/store/runs/x"), False

    def info(self):
        return record(self.id)

    def status(self):
        return "running"

    def logs(self):
        return "line 1\nline 2\n"

    def follow(self):
        yield from ("line 1\n", "line 2\n")

    def wait(self):
        return "stopped"

    def stop(self):
        self.stopped = True
        return self.id == "run-1"

    def result(self):
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


@pytest.fixture
def cluster(monkeypatch):
    """Calls reach this instead of a cluster; `run` is what they find."""
    found = SimpleNamespace(run=FakeRun(), submitted=[], addresses=[])

    def submit(job, *, address=None):
        found.submitted.append(job)
        found.addresses.append(address)
        return found.run

    def find(id, address=None):
        found.addresses.append(address)
        if not found.run.id.startswith(id):
            raise ConfigError(f"run `{id}`", "is not known")
        return found.run

    listed = [record(), record("other", "SUCCEEDED", metadata=None, start_time=None, end_time=None)]
    monkeypatch.setattr(lmray.on_ray.jobs, "submit", submit)
    monkeypatch.setattr(lmray.on_ray.jobs, "find", find)
    monkeypatch.setattr(lmray.on_ray.jobs, "list_jobs", lambda address=None: listed)
    return found


def test_submit_prints_the_id(cli, cluster, train_file):
    said = cli("submit", train_file, "train.max_steps=9", "--address", "http://there:8265")
    assert (said.code, said.out) == (0, "run-1\n") and "lmray jobs logs run-1 --follow" in said.err
    assert cluster.submitted[0].train.max_steps == 9 and cluster.addresses == ["http://there:8265"]
    assert json.loads(cli("submit", train_file, "--json").out) == {"id": "run-1", "status": "running"}


def test_submit_and_wait_ends_as_the_job_did(cli, cluster, train_file):
    cluster.run = FakeRun(outcome=Result("stopped", "/store/runs/x"))
    said = cli("submit", train_file, "--wait", "--json")
    assert said.code == 130 and json.loads(said.out)["status"] == "stopped"


def test_submit_and_follow_shows_what_it_prints_on_stderr(cli, cluster, train_file):
    said = cli("submit", train_file, "--follow", "--json")
    assert said.code == 0 and "line 1\nline 2\n" in said.err and json.loads(said.out)["status"] == "succeeded"


def test_a_job_that_failed_there_fails_here(cli, cluster):
    cluster.run = FakeRun(outcome=RemoteError("run `run-1`", "data.jsonl:3: bad row"))
    said = cli("jobs", "wait", "run")
    assert said.code == 1 and said.err == "error: run `run-1`: data.jsonl:3: bad row\n"


def test_list_shows_every_run(cli, cluster):
    lines = cli("jobs", "list").out.splitlines()
    assert lines[0].split() == ["id", "status", "kind", "name", "started", "seconds"]
    assert "関数" in lines[1] and lines[1].endswith("65")
    assert lines[2].split() == ["other", "succeeded", "-", "-", "-", "0"]
    assert [row["id"] for row in json.loads(cli("jobs", "list", "--json").out)["jobs"]] == ["run-1", "other"]


def test_status_logs_stop(cli, cluster):
    assert json.loads(cli("jobs", "status", "run", "--json").out)["status"] == "running"
    assert cli("jobs", "logs", "run").out == "line 1\nline 2\n"
    assert cli("jobs", "logs", "run", "--follow").err == "line 1\nline 2\n"
    assert cli("jobs", "stop", "run").out == "stopped\n" and cluster.run.stopped
    cluster.run = FakeRun("run-2")
    assert "had ended already" in cli("jobs", "stop", "run-2").err


def test_an_unknown_run(cli, cluster):
    said = cli("jobs", "status", "nope")
    assert said.code == 2 and "run `nope`: is not known" in said.err
