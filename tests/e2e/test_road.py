"""The whole road as a user walks it: check, run, promote, export, serve, ask; what is wrong on the way is told."""

from __future__ import annotations

import json
import os
import shutil
import signal
import urllib.request

import psutil
import pytest
import yaml
from openai import OpenAI

from lmray.metrics.events import read_events
from lmray.testing.listening import free_port
from lmray.testing.waiting import wait_until
from tests.e2e.conftest import ROOT, one_json, words


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


def serve_file(shell, train_file, port: int):
    model = yaml.safe_load(train_file.read_text(encoding="utf-8"))["model"]
    tree = {
        "kind": "serve",
        "name": "endpoint",
        "model": model,
        "adapters": [{"artifact": "colours", "stage": "production"}],
        "engine": {"name": "native", "max_batch_size": 4, "max_length": 256},
        "http": {"port": port},
        "resources": {"cpus_per_worker": 1},
    }
    path = shell.folder / "serve.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    return path


def compare(shell, train_file):
    """Several targets on one base, one of them the artifact just kept."""
    tree = yaml.safe_load(train_file.read_text(encoding="utf-8"))
    job = {key: tree[key] for key in ("model", "data", "resources")} | {"kind": "evaluate", "name": "compare"}
    job["targets"] = [{"label": "base"}, {"label": "shots", "num_fewshot": 2}, {"label": "tuned", "adapter": "colours"}]
    job["evaluate"] = {"tasks": ["json_match", "loss"], "max_examples": 2, "max_new_tokens": 4}
    (shell.folder / "compare.yaml").write_text(yaml.safe_dump(job, allow_unicode=True), encoding="utf-8")
    unknown = shell.lmray_here("run", "compare.yaml", "targets.2.adapter=colour")
    assert unknown.returncode == 2 and "did you mean `colours`" in unknown.stderr
    done = shell.lmray("run", "compare.yaml", "--json")
    assert done.returncode == 0, done.stderr
    assert "tuned: answers 2/2" in done.stderr
    targets = one_json(done.stdout)["details"]["targets"]
    assert targets["tuned"]["eval.loss"] < targets["base"]["eval.loss"] == targets["shots"]["eval.loss"]
    lines = (shell.folder.parent / "store/runs/compare/answers-shots.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 and json.loads(lines[0])["expected"]


@pytest.mark.timeout(1200)
def test_train_keep_serve_ask(shell, train_file, tmp_path):
    checked = shell.lmray("check", "train.yaml", "--json")
    assert checked.returncode == 0, checked.stderr
    assert one_json(checked.stdout)["steps"] == 6
    assert not (tmp_path / "store").exists(), "a check writes nothing"

    shutil.copytree(ROOT / "jobs", shell.folder / "jobs")
    trained = shell.python("jobs/run.py", "train.yaml", "--json")
    assert trained.returncode == 0, trained.stderr
    result = one_json(trained.stdout)
    assert result["status"] == "succeeded" and result["artifact"].startswith("colours@")
    assert {"status", "run", "artifact", "metrics", "seconds"} <= result.keys()
    assert "step 6/6" in trained.stderr
    again = shell.lmray_here("run", "train.yaml", "--json")
    assert (again.returncode, one_json(again.stdout)["status"]) == (0, "already-done")
    other = shell.lmray_here("run", "train.yaml", "adapter.r=2")
    assert other.returncode == 2 and "adapter.r: 4 -> 2" in other.stderr

    compare(shell, train_file)
    early = shell.lmray_here("run", str(serve_file(shell, train_file, free_port())))
    assert early.returncode == 2 and "no version or stage `production`" in early.stderr
    promoted = shell.lmray_here("artifacts", "promote", "colours", "production", "--json")
    assert promoted.returncode == 0, promoted.stderr
    exported = shell.lmray_here("artifacts", "export", "colours@production", "out", "--json")
    assert exported.returncode == 0, exported.stderr
    assert (shell.folder / "out" / "model.safetensors").is_file()

    port = free_port()
    service = shell.start("run", str(serve_file(shell, train_file, port)))
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/ready") or service.poll() is not None, "readiness")
        assert service.poll() is None, service.communicate()
        taken = shell.lmray("run", "serve.yaml", "name=second")
        assert taken.returncode == 2 and f"{port}" in taken.stderr, taken.stderr
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        names = [model.id for model in client.models.list()]
        assert "colours" in names
        question = [{"role": "user", "content": "say 赤 "}]
        said = client.chat.completions.create(model="colours", messages=question, max_tokens=12, temperature=0)
        spoken = shell.lmray("chat", f"http://127.0.0.1:{port}", "say 赤 ", "--model", "colours", "--max-tokens", "12")
        assert spoken.returncode == 0 and spoken.stdout.strip() == (said.choices[0].message.content or "").strip()
    finally:
        os.killpg(service.pid, signal.SIGINT)
        _, errors = service.communicate(timeout=300)
    assert service.returncode == 130, errors
    assert not answers(f"http://127.0.0.1:{port}/health")


@pytest.mark.slow  # two minutes; kills at every write, and of workers and controllers on Ray, are tests of every day
def test_killed_in_the_middle_the_same_command_goes_on(shell, train_file, tmp_path):
    """kill -9 of the driver; the Ray it started goes with it, so nothing writes beside the second attempt."""
    events = tmp_path / "store" / "runs" / "tiny" / "events.jsonl"
    arguments = ("run", "train.yaml", "train.max_steps=300", "train.save_steps=20", "--json")
    first = shell.start(*arguments)
    wait_until(lambda: len(read_events(events)) >= 12 or first.poll() is not None, "twelve steps")
    first.kill()
    first.communicate()
    wait_until(lambda: not any(_writes(process) for process in shell.alive(first)), "its Ray to end")
    done = len(read_events(events))
    assert done < 300, "killed in the middle, else the test says nothing"
    last = shell.lmray(*arguments)
    assert last.returncode == 0, last.stderr
    assert one_json(last.stdout)["status"] == "succeeded"
    assert [event["step"] for event in read_events(events)] == list(range(1, 301))


def _writes(process: psutil.Process) -> bool:
    """Ray's two node agents outlive a killed raylet by a while; they touch nothing of ours."""
    told = words(process)
    return bool(told) and not any(agent in told for agent in ("DashboardAgent", "RuntimeEnvAgent"))


@pytest.mark.slow  # three minutes; on the shared cluster a run that is asked to stop is a test of every day
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_end_it_saves_and_leaves_with_130(shell, train_file, tmp_path, number):
    """As a terminal's Ctrl-C, `timeout` and Slurm do it: the signal reaches the local Ray's processes too."""
    folder = tmp_path / "store" / "runs" / "tiny"
    long = [
        "train.max_steps=100000",
        "train.save_steps=100000",
        "train.learning_rate=1e-6",
    ]  # nothing diverges meanwhile
    running = shell.start("run", "train.yaml", *long, "--json")
    wait_until(lambda: read_events(folder / "events.jsonl") or running.poll() is not None, "a first step")
    os.killpg(running.pid, number)
    out, errors = running.communicate(timeout=300)
    assert running.returncode == 130, errors
    assert one_json(out)["status"] == "stopped"
    (checkpoint,) = folder.glob("checkpoint-*")
    assert int(checkpoint.name.rpartition("-")[2]) == len(read_events(folder / "events.jsonl"))


def test_jobs_run_py_says_what_is_wrong_as_the_command_does(shell, train_file):
    shutil.copytree(ROOT / "jobs", shell.folder / "jobs")
    done = shell.python("jobs/run.py", "train.yaml", "train.max_stepz=1")
    assert done.returncode == 2 and "did you mean `max_steps`" in done.stderr, done.stderr
