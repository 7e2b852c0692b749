"""Jobs on a cluster of their own that asks for a token, through Ray's Jobs API; and what needs no cluster."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
import yaml

import lmray
from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.checkpoints import committed
from lmray.artifacts.store import open_store, run_folder
from lmray.config import Document, decode
from lmray.context import Result
from lmray.errors import ConfigError, RemoteError
from lmray.job import EvaluateJob, ServeJob
from lmray.on_ray.job_client import api_url, connect, speaking
from lmray.on_ray.jobs import Run, find, last_result, list_jobs, submission_stem, submit
from lmray.on_ray.portable import portable
from lmray.testing.jobs import tiny_job
from lmray.testing.listening import free_port
from lmray.testing.waiting import wait_until

TOKEN = "a" * 64


PORTS = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
PORTS += ("runtime-env-agent-port", "metrics-export-port", "ray-client-server-port")


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A Ray head that asks for TOKEN: `url` of its dashboard, `address` of the cluster."""
    root, state = tmp_path_factory.mktemp("head"), tempfile.mkdtemp(prefix="lmray-")  # sockets need a short path
    numbers: set[int] = set()
    while len(numbers) < len(PORTS):
        numbers.add(free_port())
    ports = dict(zip(PORTS, numbers, strict=True))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "LMRAY_"))}
    environment |= {"HOME": str(root), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"OMP_NUM_THREADS": "1", "LMRAY_CACHE": str(root / "cache"), "LMRAY_STORE": str(root / "store")}
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=2"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    command += ["--object-store-memory=104857600", "--temp-dir", state]
    with open(root / "head.log", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{ports['dashboard-port']}"

    def answers() -> bool:
        assert process.poll() is None, (root / "head.log").read_text()
        try:
            return requests.get(f"{url}/api/version", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=5).ok
        except (requests.ConnectionError, requests.Timeout):
            return False

    try:
        wait_until(answers, "the head's dashboard")
        yield SimpleNamespace(url=url, address=f"127.0.0.1:{ports['port']}")
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # asked to end, it would wait half a minute for what it ran
        process.wait()
        shutil.rmtree(state, ignore_errors=True)


@pytest.fixture
def token(monkeypatch, tmp_path):
    """The head's token in a file, as a user has it."""
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    for name in ("RAY_AUTH_TOKEN", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    return path


@pytest.fixture
def job(tiny_model, tiny_data, tmp_path):
    return lambda **changes: tiny_job(tiny_model, tiny_data, tmp_path / "store", **changes)


def test_a_job_runs_to_its_result(head, token, job, monkeypatch, tiny_data):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.url)
    monkeypatch.chdir(tiny_data.parent)
    one = job(train__max_steps=2, output={"artifact": "関数"}, data__train=[{"source": tiny_data.name}])
    run = submit(one)
    assert run.id.startswith("tiny-") and run.status() in ("pending", "running")
    result = run.result()
    assert (result.status, run.status()) == ("succeeded", "succeeded")
    assert result.artifact == Artifacts(open_store(one.storage)).find("関数").ref
    assert "step 2/2" in "".join(run.follow()) and "step 2/2" in run.logs()
    info = run.info()
    assert info.metadata["lmray.kind"] == "train" and info.metadata["lmray.name"] == "tiny"
    assert info.metadata["lmray.version"] == lmray.__version__
    assert TOKEN not in info.model_dump_json()


def test_a_job_is_started_once_and_stops_with_what_it_has(head, token, job):
    one = job(name="long", train__max_steps=100_000)
    run = submit(one, address=head.url)
    assert submit(one, address=head.url).id == run.id
    assert find("long", head.url).id == run.id
    wait_until(lambda: "step " in run.logs(), "the first step")
    assert run.stop() and run.wait() == "stopped"
    result = run.result()
    assert (result.status, result.run) == ("stopped", str(run_folder(one)))
    assert committed(run_folder(one)), "it was asked to save, not killed"
    assert not run.stop(), "it has ended"
    again = submit(one, address=head.url)
    assert again.id == f"{run.id}-2"
    again.stop()
    assert again.wait() == "stopped"
    assert {run.id, again.id} <= {info.submission_id for info in list_jobs(head.url)}
    assert submit(one, address=head.url).id == f"{run.id}-3"
    third = find(f"{run.id}-3", head.url)
    assert third.stop() and third.wait() == "stopped"


def test_a_job_that_fails_says_why(head, token, job, tiny_data):
    tiny_data.write_text('{"prompt": "no completion"}\n')
    run = submit(job(name="fails"), address=head.url)
    with pytest.raises(RemoteError, match=r"row|column|completion") as caught:
        run.result()
    assert f"lmray jobs logs {run.id}" in str(caught.value)


JOINED = """
import os, ray
from lmray.on_ray.cluster import connected
@ray.remote(num_cpus=0)
def origin():
    import lmray
    return lmray.__file__
with connected() as offered:
    print(offered.cpus, ray.get(origin.remote()))
"""


def test_a_driver_from_outside_brings_its_package(head, token, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    environment |= {"HOME": str(tmp_path), "RAY_ADDRESS": head.address}
    command = [sys.executable, "-c", JOINED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    cpus, origin = done.stdout.split()
    assert cpus == "2.0" and "py_modules" in origin and origin != lmray.__file__


def test_an_unknown_run_names_those_there_are(head, token):
    with pytest.raises(ConfigError, match="is not known"):
        find("nothing", head.url)


def test_without_a_token_the_error_says_what_to_set(head, monkeypatch, tmp_path):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(RemoteError, match="none was sent") as caught:
        list_jobs(head.url)
    assert "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH" in str(caught.value)


def test_a_wrong_token_is_refused(head, token):
    token.write_text("b" * 64)
    with pytest.raises(RemoteError, match="was refused") as caught:
        list_jobs(head.url)
    assert "bbbb" not in str(caught.value)


def test_no_cluster_there():
    with pytest.raises(RemoteError, match="no cluster's Jobs API answers"):
        connect("http://127.0.0.1:9")


def test_a_client_address_is_refused():
    with pytest.raises(ConfigError, match="Ray Client"):
        connect("ray://127.0.0.1:10001")


def test_what_the_api_answers_with_a_failure_is_a_remote_error():
    with pytest.raises(RemoteError, match="status code 500: broken"), speaking("http://there"):
        raise RuntimeError("Request failed with status code 500: broken.\nTraceback ...")


def test_the_address_is_the_argument_then_the_environment_then_this_machine(monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert api_url() == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert api_url() == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "http://b:8265/")
    assert api_url() == "http://b:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://c:8265")
    assert api_url() == "http://c:8265"
    assert api_url("http://d:1") == "http://d:1"


def test_ids_are_ascii_and_follow_name_and_content(job):
    stem = submission_stem(job(name="関数-v2"))
    assert stem.isascii() and stem.startswith("v2-") and submission_stem(job(name="関数-v2")) == stem
    assert submission_stem(job(name="関数")).startswith("train-")
    assert submission_stem(job(name="関数-v2", train__max_steps=7)) != stem


def test_the_result_is_the_last_object_a_job_printed():
    first, last = ({"status": status, "run": "/r"} for status in ("stopped", "succeeded"))
    logs = f'step 1\n{json.dumps(first)}\n{json.dumps(last)}\n{{broken\n{{"other": 1}}\nRay says bye\n'
    assert last_result(logs) == last
    assert last_result("nothing\n") is None


class Client:
    """Answers as Ray's client does, without a cluster."""

    def __init__(self, status, logs="", message=None):
        self.facts, self.logs = SimpleNamespace(status=SimpleNamespace(value=status), message=message), logs

    def get_job_info(self, id):
        return self.facts

    def get_job_logs(self, id):
        return self.logs


def test_a_job_that_died_without_a_word_shows_rays_message():
    run = Run("x-1", Client("FAILED", message="python: not found"))
    with pytest.raises(RemoteError, match="python: not found"):
        run.result()


def test_a_job_killed_before_it_printed_anything_was_stopped():
    assert Run("x-1", Client("STOPPED")).result() == Result("stopped", run="")


def test_relative_paths_become_absolute(job, tiny_data, tmp_path):
    fetched = ["pypi:bfcl-eval", "hf:owner/name:train", "python:pydoc_data.topics"]
    (tmp_path / "dataset_info.json").write_text("{}", encoding="utf-8")
    mine = (tiny_data.name, "*.jsonl", "dataset_info.json:alpaca")
    sources = [{"source": text} for text in (*mine, *fetched)]
    moved = portable(job(data__train=sources).changed({"storage": "s"}), folder=tiny_data.parent)
    assert [one.source for one in moved.data.train] == [*(str(tmp_path / name) for name in mine), *fetched]
    assert Path(moved.storage).is_absolute()


def test_a_relative_path_that_leads_nowhere_is_refused(job, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.train\.0\.source: relative path `gone.jsonl`") as caught:
        portable(job(data__train=[{"source": "gone.jsonl"}]), folder=tmp_path)
    assert "every node sees" in str(caught.value)
    with pytest.raises(ConfigError, match=r"model\.source"):
        portable(job(model__source="./gone"), folder=tmp_path)


def test_names_and_home_folders_stay_what_they_are(job, tmp_path):
    moved = portable(job(model__source="smollm2-135m", data__train=[{"source": "~/x.jsonl"}]), folder=tmp_path)
    assert moved.model.source == "smollm2-135m" and moved.data.train[0].source == str(Path.home() / "x.jsonl")


def test_paths_of_other_kinds_are_found_too(job, tmp_path):
    (tmp_path / "keys").write_text("k")
    sharding = {"name": "deepspeed", "config": "keys"}
    moved = portable(job(sharding=sharding, data__train=[{"source": "pypi:x"}]), folder=tmp_path)
    assert moved.sharding.config == str(tmp_path / "keys")
    (tmp_path / "adapter").mkdir()
    tree = {"name": "s", "model": {"source": "m"}, "engine": "native"}
    tree["http"] = {"api_keys_file": "keys", "admin_keys_file": "keys"}
    http = portable(decode(ServeJob, Document("s", tree)), folder=tmp_path).http
    assert http.api_keys_file == http.admin_keys_file == str(tmp_path / "keys")
    text = """
    name: e
    model: {source: m}
    data: {train: [{source: "pypi:x"}], eval: {sources: [{source: keys}]}}
    targets: [{label: base}, {label: a, adapter: adapter}, {label: b, adapter: kept@production},
      {label: c, model: adapter}, {label: d, model: "artifact:kept"}]
    evaluate: {tasks: [loss, {name: lm_eval, tasks: mine, include_path: adapter}]}
    """
    moved = portable(decode(EvaluateJob, Document("e", yaml.safe_load(text))), folder=tmp_path)
    assert moved.data.eval.sources[0].source == str(tmp_path / "keys")
    adapters, models = (
        [None, str(tmp_path / "adapter"), "kept@production"],
        [str(tmp_path / "adapter"), "artifact:kept"],
    )
    assert [target.adapter for target in moved.targets[:3]] == adapters
    assert [target.model for target in moved.targets[3:]] == models
    assert moved.evaluate.tasks[1].include_path == str(tmp_path / "adapter")
