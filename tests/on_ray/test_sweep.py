"""A sweep on Ray Tune: real trials of a tiny model, stopping early, going on after an end, failures."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading

import pytest
import ray
import yaml

from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.files import write_json
from lmray.artifacts.store import open_store
from lmray.config import Document, decode, dump
from lmray.context import Result
from lmray.errors import CapacityError, DataError, LmrayError
from lmray.job import SweepJob, load
from lmray.metrics.events import read_events
from lmray.on_ray.run import sigterm_as_interrupt
from lmray.on_ray.sweep import sweep
from lmray.testing.jobs import run_here, tiny_job
from lmray.testing.waiting import wait_until

STEPS = 8
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this module


@pytest.fixture
def make(tiny_model, tiny_data, tmp_path):
    def job(**fields):
        small = {"resources": {"cpus_per_worker": 1}, "train__max_steps": STEPS, "output": {"artifact": "関数"}}
        tree = dump(tiny_job(tiny_model, tiny_data, tmp_path / "store", **small))
        space = {"adapter.r": {"choice": [2, 4]}, "train.learning_rate": {"loguniform": [1e-4, 1e-1]}}
        document = {"kind": "sweep", "name": "探索", "job": tree, "space": space, "objectives": {"eval.loss": "min"}}
        document |= {"storage": str(tmp_path / "store"), "scheduler": {"name": "asha", "grace_steps": 2}}
        document |= {"search": {"num_trials": 4}, "max_concurrent_trials": 2}
        return decode(SweepJob, Document("sweep", document | fields))

    return job


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store" / "runs" / "探索"


def outcome(folder) -> dict:
    return json.loads((folder / "sweep.json").read_text(encoding="utf-8"))


def fake(job, ctx):
    """Learns at once: the loss is the distance of the learning rate from 0.01."""
    found = ctx.resume_from()
    start = int(found.name.rpartition("-")[2]) if found else 0
    loss = abs(job.train.learning_rate - 0.01)
    write_json(ctx.folder / "plan.json", {"steps": STEPS})
    for step in range(start + 1, STEPS + 1):
        checkpoint = ctx.scratch / "checkpoint"
        write_json(checkpoint / "progress.json", {"step": step})
        ctx.report(step, {"eval.loss": loss + 1 / step})
        ctx.commit(step, checkpoint)
    write_json(ctx.folder / "adapter" / "adapter_config.json", {"r": job.adapter.r})
    origin = {"kind": "adapter", "base": {"source": job.model.source}, "parents": (), "run_key": "k"}
    details = {"adapter": str(ctx.folder / "adapter"), **origin}
    result = Result("succeeded", str(ctx.folder), metrics={"eval.loss": loss + 1 / STEPS}, details=details)
    write_json(ctx.folder / "result.json", result.to_json())
    return result


def test_a_store_that_is_a_file_is_told_before_ray_starts(make, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setattr("lmray.on_ray.sweep.connected", lambda: pytest.fail("Ray started"))
    with pytest.raises(CapacityError, match="is a file"):
        sweep(make(storage=str(tmp_path / "file")))


def test_a_sweep_keeps_the_best_of_real_trainings(ray_cluster, make, folder, tmp_path, capsys):
    job = make()
    result = sweep(job)
    written = outcome(folder)
    assert result.status == "succeeded" and written["status"] == "succeeded" and len(written["trials"]) == 4
    best, *others = written["trials"]
    assert best["state"] == "finished" and result.metrics == {"eval.loss": best["objective"]}
    assert all(one["objective"] >= best["objective"] for one in others if one["state"] == "finished")
    assert any(one["state"] == "stopped" and one["step"] < STEPS for one in others), "ASHA stops some of four"
    assert all(
        event["step"] % 2 == 0
        for event in read_events(folder / "trials" / best["id"] / "events.jsonl")
        if "eval.loss" in event
    )
    kept = Artifacts(open_store(job.storage)).find("関数")
    assert kept.ref == result.artifact and kept.run_key == best["details"]["run_key"]
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= set(kept.files)
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().err
    assert "trials 4/4" in said and "stopped early at step" in said and best["id"] in said.splitlines()[-4]
    again = sweep(job)
    assert (again.status, again.metrics) == ("already-done", result.metrics)
    repeated = run_here(load(folder / "best.yaml"), tmp_path / "scratch")
    assert repeated.metrics["eval.loss"] == pytest.approx(best["objective"], abs=1e-5)


def test_random_search_without_a_scheduler_finishes_every_trial(ray_cluster, make, folder):
    job = make(search={"name": "random", "num_trials": 2}, scheduler={"name": "none"})
    result = sweep(job, train=fake, progress=False)
    assert result.status == "succeeded"
    assert [one["state"] for one in outcome(folder)["trials"]] == ["finished", "finished"]
    assert {key for one in outcome(folder)["trials"] for key in one["values"]} == {"adapter.r", "train.learning_rate"}


def test_an_interrupted_sweep_goes_on(ray_cluster, make, folder, tmp_path):
    job, gate = make(search={"num_trials": 2}, max_concurrent_trials=1), tmp_path / "gate"

    def held(job, ctx):  # the second trial waits half way
        if len(list(ctx.folder.parent.iterdir())) == 2 and not gate.exists():
            ctx.report(1, {"eval.loss": 9.0})
            threading.Event().wait()
        return fake(job, ctx)

    def interrupt():
        wait_until(lambda: len(list(folder.glob("trials/*/events.jsonl"))) == 2, "the second trial")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    with sigterm_as_interrupt():
        first = sweep(job, train=held, progress=False)
    assert first.status == "stopped" and outcome(folder)["status"] == "stopped" and first.artifact is None
    begun = {path.name for path in (folder / "trials").iterdir()}
    gate.touch()
    second = sweep(job, train=held, progress=False)
    assert second.status == "succeeded" and len(outcome(folder)["trials"]) == 2
    assert begun <= {one["id"] for one in outcome(folder)["trials"]}


def test_a_trial_with_wrong_input_is_not_tried_again_and_the_others_go_on(ray_cluster, make, folder, tmp_path):
    counter = tmp_path / "attempts"

    def picky(job, ctx):
        if job.adapter.r == 4:
            with open(counter, "a") as file:
                file.write("x")
            raise DataError("rows.jsonl:3", "bad row")
        return fake(job, ctx)

    space = {"adapter.r": {"choice": [2, 4]}}
    result = sweep(make(search={"num_trials": 2, "seed": 0}, space=space), train=picky, progress=False)
    trials = outcome(folder)["trials"]
    failed = [one for one in trials if one["state"] == "failed"]
    assert result.status == "succeeded" and trials[0]["values"]["adapter.r"] == 2
    assert failed and all("rows.jsonl:3: bad row" in one["error"] for one in failed)
    assert counter.read_text() == "x" * len(failed)


@pytest.mark.slow  # Ray Tune gives up on each trial by itself; what becomes of failed ones is in the tests above
def test_a_sweep_whose_trials_all_fail_says_why(ray_cluster, make, folder):
    def broken(job, ctx):
        raise ZeroDivisionError("the reason")

    job = make(search={"num_trials": 2}, job=_without_retries(make()))
    with pytest.raises(LmrayError, match=r"all 2 trials failed: .*the reason"):
        sweep(job, train=broken, progress=False)
    assert outcome(folder)["status"] == "failed"
    assert yaml.safe_load((folder / "job.yaml").read_text(encoding="utf-8"))["name"] == "探索"


def _without_retries(job: SweepJob) -> dict:
    return dump(job.job.changed({"resources.max_failures": 0}))
