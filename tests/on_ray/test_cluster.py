"""Connecting to Ray, and what comes back from it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import ray

from lmray.errors import CapacityError, ConfigError, DataError, RemoteError
from lmray.job import Resources
from lmray.on_ray import cluster
from lmray.on_ray.cluster import ClusterResources, Node, check_resources, cluster_resources, connected, user_token
from lmray.on_ray.failures import error_inside, reason, unwrapped


def test_a_connection_that_is_there_is_used_and_left_alone(ray_cluster):
    with connected() as offered:
        assert offered == cluster_resources() and (offered.cpus, offered.gpus) == (4, 0)
    assert ray.is_initialized()


def test_workers_fit_whole_on_a_node():
    offered = ClusterResources((Node("a", 3, 0, 1e9), Node("b", 8, 2, 1e9)))
    assert offered.room_for(cpus=2, gpus=0) == 5
    assert offered.room_for(cpus=2, gpus=1) == 2
    assert offered.room_for(cpus=9, gpus=0) == 0


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"gpus_per_worker": 1}, "but there is none"),
        ({"workers": 5}, "room for 4"),
        ({"cpus_per_worker": 5}, "room for 0"),
        ({"workers": 3, "cpus_per_worker": 2}, "lower `resources.workers` to 2"),
    ],
)
def test_what_can_never_fit_is_refused(ray_cluster, asked, found):
    with pytest.raises(CapacityError, match=found):
        check_resources(Resources(**asked))


def test_what_fits_is_let_through(ray_cluster):
    check_resources(Resources(workers=2, cpus_per_worker=2))


@pytest.mark.parametrize(
    ("address", "error", "found"),
    [
        ("127.0.0.1:9", RemoteError, "no cluster answers"),
        ("auto", RemoteError, "ray start --head"),
        ("http://127.0.0.1:8265", ConfigError, "lmray submit CONFIG --address"),
        ("ray://127.0.0.1:10001", ConfigError, "HOST:6379, auto, local"),
        ("somewhere", ConfigError, "is no address"),
    ],
)
def test_an_address_that_leads_nowhere(monkeypatch, tmp_path, address, error, found):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    if address == "auto":
        monkeypatch.setattr(ray, "init", _no_cluster)
    with pytest.raises(error, match=found), connected():
        pass


def _no_cluster(**options):
    raise ConnectionError("Could not find any running Ray instance.")


def test_a_refused_token_says_what_to_set(monkeypatch):
    def refuse(**options):
        raise ray.exceptions.AuthenticationError("no")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(RemoteError, match="RAY_AUTH_TOKEN_PATH"), connected():
        pass


LOCAL = """
import os, ray, signal, subprocess, sys, threading
from pathlib import Path
from lmray.on_ray.cluster import connected
from lmray.on_ray.run import sigterm_as_interrupt
@ray.remote
def token(): return os.environ["RAY_AUTH_MODE"], len(os.environ["RAY_AUTH_TOKEN"])
named = str(Path(ray.__file__).parent / "mine.py")
mine = subprocess.Popen([sys.executable, "-c", "input()", named], stdin=subprocess.PIPE)
with sigterm_as_interrupt(), connected(num_cpus=3) as offered:
    assert offered.cpus == 3
    print(*ray.get(token.remote()), os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"])
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait()
    except KeyboardInterrupt:
        print("interrupted")
assert not ray.is_initialized()
assert mine.poll() is None, "a child that Ray did not start"
mine.kill()
assert "RAY_AUTH_TOKEN" not in os.environ and "RAY_AUTH_MODE" not in os.environ
assert "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER" not in os.environ
"""


def test_a_local_ray_has_a_token_and_leaves_nothing_behind(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", LOCAL], env=environment, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["token", "64", "0", "interrupted"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_a_local_ray_that_starts_too_slowly_is_started_once_more(monkeypatch, failures):
    attempts, ended = [], []

    def start(**told):
        attempts.append(told["address"])
        if len(attempts) <= failures:
            raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray, "init", start)
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append("connection"))
    monkeypatch.setattr(cluster, "_end_ray_processes", lambda others: ended.append("processes"))
    if failures == 2:
        with pytest.raises(RemoteError, match="did not start within 30 s, twice\n  hint: is the machine busy"):
            cluster._start_local(None, None)
    else:
        cluster._start_local(None, None)
    assert len(attempts) == min(failures + 1, 2) and ended == ["connection", "processes"] * failures


def test_any_other_failure_to_start_passes_as_it_is(monkeypatch):
    def start(**told):
        raise ValueError("num_cpus is negative")

    monkeypatch.setattr(ray, "init", start)
    with pytest.raises(ValueError, match="negative"):
        cluster._start_local(-1, None)


def test_the_users_token_is_found_where_ray_looks(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("one\n")
    assert user_token() == "one"
    (tmp_path / "named").write_text("two")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "named"))
    assert user_token() == "two"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "three")
    assert user_token() == "three"


def test_a_token_file_that_is_named_must_be_there(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match="gone"):
        user_token()


def test_the_error_of_a_worker_arrives_as_it_was_raised(ray_cluster):
    @ray.remote
    def fails():
        raise DataError("rows.jsonl:3", "bad row", hint="mend it")

    with pytest.raises(DataError) as caught, unwrapped():
        ray.get(fails.remote())
    assert type(caught.value) is DataError and str(caught.value) == "rows.jsonl:3: bad row\n  hint: mend it"


def test_an_error_is_found_in_whatever_ray_wraps_it():
    inner = DataError("rows.jsonl:3", "bad row")

    group, controller = RuntimeError("workers"), RuntimeError("controller")
    group.worker_failures = {0: RuntimeError("other"), 1: inner}
    controller.controller_failure = group
    assert error_inside(controller) is inner
    assert error_inside(RuntimeError("plain")) is None
    assert reason(controller) == "rows.jsonl:3: bad row"
    assert reason(RuntimeError("Traceback\n\nlast line\n")) == "last line"
    assert reason(RuntimeError()) == "RuntimeError" and reason(None) == "unknown"


def test_an_error_without_one_of_ours_passes_as_it_is():
    with pytest.raises(ZeroDivisionError), unwrapped():
        raise ZeroDivisionError
