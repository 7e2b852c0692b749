"""A step that memory does not suffice for: said with the plan's figures, and done again with half the micro-batch.

The shortage is the allocator's own, of a size that no machine has; `room` decides which micro-batches meet it.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from lmray.artifacts.patience import Patience
from lmray.artifacts.store import run_folder
from lmray.context import LocalContext
from lmray.errors import ConfigError, OutOfMemoryError
from lmray.job import Resources
from lmray.metrics.events import read_events
from lmray.models.machine import is_out_of_memory
from lmray.testing.jobs import curve, run_here, tiny_job
from lmray.train import loop as loops
from lmray.train import model, out_of_memory, program
from lmray.train.learner import Learner
from lmray.train.out_of_memory import (
    RanOutError,
    fitting,
    noticing_shortage,
    planned_bytes,
    smaller_micro_batch,
)
from lmray.train.plan import make_plan
from lmray.train.prepare import prepare

HALVE = {"resources": {"on_oom": "halve"}}


@pytest.fixture
def job(tiny_model, tiny_data, tmp_path):
    def make(**changes):
        changes = {"train__per_device_train_batch_size": 8, "train__save_steps": 2, **changes}
        return tiny_job(tiny_model, tiny_data, tmp_path / "store", **changes)

    return make


def allocate() -> torch.Tensor:
    return torch.empty(2**60, dtype=torch.uint8)


@pytest.fixture
def room(monkeypatch):
    """Gives micro-batches of more than so many examples, from step `since` on, no memory; returns the sizes of all."""
    taken, steps = [], [0]
    real_loss, real_step = Learner._loss, Learner.step

    def put(most: int, *, since: int = 1) -> list[int]:
        def loss(self, batch):
            taken.append(sum(map(len, batch.lengths)))
            if taken[-1] > most and steps[0] >= since:
                allocate()
            return real_loss(self, batch)

        def step(self, batches, **given):
            steps[0] = given["step"]
            return real_step(self, batches, **given)

        monkeypatch.setattr(Learner, "_loss", loss)
        monkeypatch.setattr(Learner, "step", step)
        return taken

    return put


def noted(job) -> dict:
    return json.loads((run_folder(job) / "memory.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (allocate, "1073741824.0 GiB could not be allocated"),
        (lambda: np.empty(2**58), "Unable to allocate 2.00 EiB for an array"),
        (lambda: bytearray(2**62), "Python could not allocate an object"),
    ],
)
def test_what_an_allocator_says_is_known_for_what_it_is(act, words):
    with pytest.raises(RanOutError) as caught, noticing_shortage(3):
        act()
    assert caught.value.step == 3 and caught.value.found.startswith(words)


def test_a_gpus_words_are_kept_without_the_allocators_advice():
    text = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has 1 GiB. If reserved but unallocated memory is"
    with pytest.raises(RanOutError, match=r"Tried to allocate 20.00 MiB. GPU 0 has 1 GiB.'\)$"), noticing_shortage(1):
        raise torch.OutOfMemoryError(text)
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"))
    assert is_out_of_memory(RuntimeError("unable to mmap 6352568 bytes from file <a>: Cannot allocate memory (12)"))


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("memory")])
def test_other_errors_pass_as_they_are(error):
    with pytest.raises(type(error)) as caught, noticing_shortage(1):
        raise error
    assert caught.value is error


def test_a_job_that_is_to_fail_says_what_was_planned_and_what_would_fit(job, tmp_path, room):
    one = job(train__gradient_accumulation_steps=2)
    room(7, since=3)
    with pytest.raises(OutOfMemoryError) as caught:
        run_here(one, tmp_path / "scratch")
    text, plan = str(caught.value), make_plan(one)
    assert text.startswith("run `tiny`: ran out of memory at step 3 with 8 row(s) a forward pass, on worker 0: ")
    assert "GiB could not be allocated; the process took " in text and "(weights " in text and "activations " in text
    assert "`resources.on_oom=halve` goes on from its last checkpoint; or under another `name`: " in text
    assert "`train.per_device_train_batch_size=4 train.gradient_accumulation_steps=4` (" in text
    assert "`train.gradient_checkpointing=true` (" in text and "`model.dtype=bfloat16` (" in text
    assert "fsdp2" not in text, "one worker has nobody to share with"
    assert caught.value.final and caught.value.exit_code == 1 and caught.value.micro_batch is None
    assert noted(one)["micro_batch"] == 4 and noted(one)["history"][0]["step"] == 3
    assert plan.memory_bytes["total"] > planned_bytes(one, plan, 4) > planned_bytes(one, plan, 1) > 0
    assert not (run_folder(one) / "result.json").exists()


def test_halved_the_run_ends_with_the_curve_of_one_that_had_room(job, tmp_path, room, capfd):
    straight = job(name="straight", train__eval_steps=3)
    run_here(straight, tmp_path / "scratch")
    one = job(name="halved", train__eval_steps=3, evaluate={"tasks": ["loss"]}, **HALVE)
    sizes = room(2, since=4)
    result = run_here(one, tmp_path / "scratch")
    assert result.status == "succeeded" and result.details["micro_batch"] == 2
    assert curve(one) == pytest.approx(curve(straight), abs=1e-5)
    assert curve(one, "eval.loss") == pytest.approx(curve(straight, "eval.loss"), abs=1e-5)
    assert [event["step"] for event in read_events(run_folder(one) / "events.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert max(sizes[-4:]) == 2 and {8, 4} <= set(sizes)
    assert [entry["micro_batch"] for entry in noted(one)["history"]] == [8, 4]
    said = capfd.readouterr().err
    assert "run `halved`: 2 row(s) a forward pass instead of 8" in said
    assert "ran out of memory at step 4 with 4 row(s) a forward pass, on worker 0: " in said
    report = (run_folder(one) / "report.html").read_text(encoding="utf-8")
    assert "Out of memory at step 4 with 8 row(s)" in report and "It ended with 2 row(s) a forward pass" in report
    assert "Out of memory" not in (run_folder(straight) / "report.html").read_text(encoding="utf-8")


def test_the_held_out_loss_is_taken_with_the_same_micro_batch(job, tmp_path, monkeypatch):
    sizes, real = [], loops.held_out_loss

    def measured(*args, batch_size, **rest):
        sizes.append(batch_size)
        if batch_size > 4:
            allocate()
        return real(*args, batch_size=batch_size, **rest)

    monkeypatch.setattr(loops, "held_out_loss", measured)
    one = job(train__eval_steps=2, **HALVE)
    assert run_here(one, tmp_path / "scratch").status == "succeeded"
    assert sizes == [8, 4, 4, 4] and noted(one)["history"][0]["step"] == 2


def test_a_step_that_was_applied_before_memory_ran_out_is_not_applied_twice(job, tmp_path, monkeypatch):
    straight = job(name="straight")
    run_here(straight, tmp_path / "scratch")
    real, short = Learner._follow, [True]

    def follow(self, step, learning_rate):
        if step == 4 and short:
            short.pop()
            allocate()
        real(self, step, learning_rate)

    monkeypatch.setattr(Learner, "_follow", follow)
    one = job(name="halved", **HALVE)
    run_here(one, tmp_path / "scratch")
    assert not short and curve(one) == pytest.approx(curve(straight), abs=1e-5)


def test_with_one_row_there_is_nothing_left_to_halve(job, tmp_path, room):
    one = job(**HALVE)
    room(0)
    with pytest.raises(OutOfMemoryError, match=r"at step 1 with 1 row\(s\)") as caught:
        run_here(one, tmp_path / "scratch")
    assert [entry["micro_batch"] for entry in noted(one)["history"]] == [8, 4, 2, 1]
    assert noted(one)["micro_batch"] == 1 and caught.value.micro_batch is None
    assert "halve" not in str(caught.value) and "per_device_train_batch_size" not in str(caught.value)
    assert "with 8 row(s) a forward pass, or " in str(caught.value), "the plan's figure of one row stands beside"


def test_the_same_job_begins_with_what_was_found_where_it_halves_and_with_its_own_where_it_does_not(
    job, tmp_path, room
):
    halving, failing = job(**HALVE), job()
    room(2)
    assert run_here(halving, tmp_path / "scratch", stop_at=3).status == "stopped"
    sizes = room(8)
    sizes.clear()
    assert run_here(halving, tmp_path / "scratch", stop_at=2).status == "stopped"
    assert set(sizes) == {2}
    sizes.clear()
    result = run_here(failing, tmp_path / "scratch")
    assert set(sizes) == {8} and result.details["micro_batch"] == 8


def test_a_model_that_does_not_fit_is_no_matter_of_the_micro_batch(job, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "load_model", lambda *args, **rest: allocate())
    one = job(**HALVE)
    with pytest.raises(OutOfMemoryError, match="while the model was placed, on worker 0") as caught:
        run_here(one, tmp_path / "scratch")
    assert len(noted(one)["history"]) == 1 and noted(one)["micro_batch"] == 8
    assert "per_device_train_batch_size" not in str(caught.value)


@pytest.mark.parametrize("on_oom", ["fail", "halve"])
def test_a_shortage_while_the_result_is_measured_is_told_and_costs_no_step(job, tmp_path, monkeypatch, on_oom):
    one = job(evaluate={"tasks": ["loss"]}, resources={"on_oom": on_oom})
    with monkeypatch.context() as patch, pytest.raises(OutOfMemoryError) as caught:
        patch.setattr(program, "measure", lambda *args, **rest: allocate())
        run_here(one, tmp_path / "scratch")
    text = str(caught.value)
    assert "ran out of memory while the result was measured, on worker 0: 1073741824.0 GiB could not" in text
    assert "the same command measures" in text and "`evaluate.batch_size=8`" in text and "per_device" not in text
    assert caught.value.micro_batch is None and not (run_folder(one) / "result.json").exists()
    assert [entry["step"] for entry in noted(one)["history"]] == [None] and noted(one)["micro_batch"] == 8
    result = run_here(one, tmp_path / "scratch")
    assert result.status == "succeeded" and result.details["micro_batch"] == 8 and len(curve(one)) == 6
    report = (run_folder(one) / "report.html").read_text(encoding="utf-8")
    assert "Out of memory while the result was measured" in report


def test_a_shortage_that_cannot_be_noted_ends_the_run_with_both(job, tmp_path, room, monkeypatch):
    def full(path, value):
        raise OSError(28, "No space left on device")

    room(0)
    one = job(**HALVE)
    context = LocalContext(run_folder(one), scratch=tmp_path / "scratch", patience=Patience(total_s=0))
    monkeypatch.setattr(out_of_memory, "write_json", full)
    with pytest.raises(OutOfMemoryError, match=r"at step 1 .*memory\.json failed for .*No space left") as caught:
        program.train(one, context)
    assert caught.value.micro_batch is None and "same command goes on" in caught.value.hint


def test_what_fits_is_what_the_planner_says_of_the_changed_job(job):
    one = job(resources={"workers": 2}, sharding="ddp", model__kernels="plain")
    plan, prepared = make_plan(one), prepare(one)
    found = fitting(one, plan, prepared, 8, None)
    assert [text.split(" ")[0].strip("`") for text in found] == [
        "train.per_device_train_batch_size=4",
        "train.gradient_checkpointing=true",
        "model.dtype=bfloat16",
    ], "what is shared of so small a model is less than what two gathered blocks take"
    large = replace(plan, memory_bytes={**plan.memory_bytes, "total": plan.memory_bytes["total"] + 2**40})
    assert any(text.startswith("`sharding=fsdp2`") for text in fitting(one, large, prepared, 8, None))
    again = one.changed({"train.gradient_checkpointing": True, "model.dtype": "bfloat16", "model.kernels": "plain"})
    assert not any(
        "checkpointing" in one or "dtype" in one for one in fitting(again, make_plan(again), prepared, 8, None)
    )
    assert fitting(one, plan, prepared, 8, 1) == [], "a byte holds none of them"
    assert fitting(one, plan, prepared, 1, None)[0].startswith("`train.gradient_checkpointing")


def test_the_micro_batch_that_fits_divides_the_rows_of_a_step(job):
    one = job(train__per_device_train_batch_size=12)
    plan = make_plan(one)
    fixed = plan.memory_bytes["total"] - 12 * plan.row_bytes
    holding = {rows: int((fixed + (rows + 0.5) * plan.row_bytes) / 0.9) for rows in (0, 1, 5, 11)}
    found = {rows: smaller_micro_batch(one, plan, 12, memory) for rows, memory in holding.items()}
    assert found == {0: 0, 1: 1, 5: 4, 11: 6}
    assert smaller_micro_batch(one, plan, 12, None) == 6 and smaller_micro_batch(one, plan, 1, None) == 0


def test_another_wish_than_the_two_is_refused(job):
    assert Resources().on_oom == "fail"
    with pytest.raises(ConfigError, match=r"resources\.on_oom.*`?retry") as caught:
        job(resources={"on_oom": "retry"})
    assert "halve" in str(caught.value)
    assert make_plan(job()).run_key == make_plan(job(**HALVE)).run_key, "it is no part of what is computed"
