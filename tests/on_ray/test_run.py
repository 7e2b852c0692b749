"""Running a job of any kind: which adapter, and what a signal does."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import SimpleNamespace

import pytest

from lmray.context import Result
from lmray.errors import ConfigError, DataError, RemoteError
from lmray.on_ray import run as module
from lmray.on_ray.run import run, sigterm_as_interrupt


@pytest.fixture
def adapter(monkeypatch):
    """Puts a function in the place of the adapter of kind `train`."""

    def put(function):
        monkeypatch.setitem(sys.modules, "fake_adapter", SimpleNamespace(train=function))
        monkeypatch.setitem(module.ADAPTERS, "train", ("fake_adapter", "train"))

    return put


JOB = SimpleNamespace(kind="train", name="x")


def test_a_job_goes_to_its_kinds_adapter(ray_cluster, adapter):
    adapter(lambda job, progress: Result("succeeded", f"{job.name} {progress}"))
    assert run(JOB, progress=False).run == "x False"


def test_an_adapters_error_is_the_one_inside(ray_cluster, adapter):
    def fails(job, progress):
        raise RuntimeError("wrapped") from DataError("rows.jsonl:3", "bad row")

    adapter(fails)
    with pytest.raises(DataError, match="bad row"):
        run(JOB)


def test_sigterm_interrupts_as_ctrl_c_does(ray_cluster, adapter):
    def stopped(job, progress):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait()
        except KeyboardInterrupt:
            return Result("stopped", "")

    adapter(stopped)
    before = signal.getsignal(signal.SIGTERM)
    assert run(JOB).status == "stopped"
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_interrupts_where_sigint_is_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a job that Ray, nohup or a shell's & started
    try:
        with pytest.raises(KeyboardInterrupt), sigterm_as_interrupt():
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_service_runs_until_a_signal_and_is_taken_down(ray_cluster, monkeypatch, capsys, number):
    stopped = []

    def serve(job, ended):
        threading.Thread(target=os.kill, args=(os.getpid(), number)).start()
        return SimpleNamespace(url="http://127.0.0.1:8000", stop=lambda: stopped.append(job.name))

    monkeypatch.setattr(module, "prepare", lambda job: None)
    monkeypatch.setitem(sys.modules, "lmray.on_ray.serve", SimpleNamespace(serve=serve))
    result = run(SimpleNamespace(kind="serve", name="x"))
    assert stopped == ["x"] and result.status == "stopped" and result.details == {"url": "http://127.0.0.1:8000"}
    assert "serving at http://127.0.0.1:8000" in capsys.readouterr().err


def test_a_service_reads_its_job_anew_at_a_signal_and_goes_on_where_that_cannot_be_served(
    ray_cluster, monkeypatch, capsys, caplog
):
    other = SimpleNamespace(kind="train", name="other")
    mistakes = ConfigError("file.yaml: kind", "unknown kind"), ZeroDivisionError("by zero")
    jobs = iter((SimpleNamespace(kind="serve", name="new"), other, *mistakes))
    told, stopped = [], []

    def again():
        found = next(jobs)
        last = isinstance(found, ZeroDivisionError)
        os.kill(os.getpid(), signal.SIGTERM if last else signal.SIGUSR1)
        if isinstance(found, Exception):
            raise found
        return found

    def serve(job, ended):
        os.kill(os.getpid(), signal.SIGUSR1)
        changed = {"update": lambda job: told.append(job.name), "stop": lambda: stopped.append(job.name)}
        return SimpleNamespace(name=job.name, url="http://127.0.0.1:8000", **changed)

    monkeypatch.setattr(module, "prepare", lambda job: None)
    monkeypatch.setitem(sys.modules, "lmray.on_ray.serve", SimpleNamespace(serve=serve))
    assert run(SimpleNamespace(kind="serve", name="old"), again=again).status == "stopped"
    assert (told, stopped) == (["new"], ["old"])
    said = capsys.readouterr().err
    assert "old: updated" in said and "old: not updated; its job stays what it was\nfile.yaml: kind: unknown" in said
    assert "kind: is `train` now" in said
    assert "ZeroDivisionError: by zero" in caplog.text


def test_a_signal_ends_a_service_that_has_not_started_or_changed_yet(ray_cluster, monkeypatch):
    def serve(job, ended):
        assert not ended()
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended(), "while the main thread is busy"
        raise RemoteError("endpoint", "was stopped before it answered")

    monkeypatch.setattr(module, "prepare", lambda job: None)
    monkeypatch.setitem(sys.modules, "lmray.on_ray.serve", SimpleNamespace(serve=serve))
    assert run(SimpleNamespace(kind="serve", name="x")).status == "stopped"


def test_a_service_that_does_not_start_fails(ray_cluster, monkeypatch):
    def serve(job, ended):
        raise RemoteError("endpoint", "did not start")

    monkeypatch.setattr(module, "prepare", lambda job: None)
    monkeypatch.setitem(sys.modules, "lmray.on_ray.serve", SimpleNamespace(serve=serve))
    with pytest.raises(RemoteError, match="did not start"):
        run(SimpleNamespace(kind="serve", name="x"))


def test_signals_are_left_alone_outside_the_main_thread(ray_cluster, adapter):
    adapter(lambda job, progress: Result("succeeded", ""))
    outcome = []
    thread = threading.Thread(target=lambda: outcome.append(run(JOB).status))
    thread.start()
    thread.join()
    assert outcome == ["succeeded"]
