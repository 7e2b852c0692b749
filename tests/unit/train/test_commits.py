"""Checkpoints are committed beside the steps that follow: nothing waits but what must, and nothing is lost."""

from __future__ import annotations

import json
import math
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from lmray.artifacts import checkpoints
from lmray.artifacts.checkpoints import committed
from lmray.artifacts.files import read_sealed, write_json
from lmray.artifacts.patience import Patience
from lmray.artifacts.store import run_folder
from lmray.context import LocalContext
from lmray.errors import CheckpointError, DivergenceError
from lmray.metrics.events import EventLog, read_events
from lmray.testing.jobs import curve, run_here, tiny_job
from lmray.testing.waiting import wait_until
from lmray.train import loop as loops
from lmray.train import program
from lmray.train.checkpoint import Progress, save_checkpoint
from lmray.train.commits import Commits, Snapshot
from lmray.train.learner import Learner, StepReport

LONG_S = 60.0
"""What never happens has not happened by then."""
NO_STEP = -9


@pytest.fixture
def job(tiny_model, tiny_data, tmp_path):
    def make(**changes):
        return tiny_job(
            tiny_model, tiny_data, tmp_path / "store", **{"resources": {"async_checkpoints": True}, **changes}
        )

    return make


def saved(job) -> list[int]:
    return [int(path.name.rpartition("-")[2]) for path in committed(run_folder(job))]


def threads() -> list[str]:
    """Of commits."""
    return [one.name for one in threading.enumerate() if one.name.startswith("lmray-commit")]


class Store:
    """Copies to the store as ever, but the checkpoint of step `held` not before it is let, which is when the next one
    is to follow. `log` says what happened, in order."""

    def __init__(self, monkeypatch, *, held: int = NO_STEP):
        self.log: list[str] = []
        self.begun, self.let = threading.Event(), threading.Event()
        copy, report, save = checkpoints.replace_folder, LocalContext.report, loops.save_checkpoint

        def slow(source: Path, target: Path) -> None:
            step = int(target.name.rpartition("-")[2])
            self.log.append(f"copy {step}")
            if step == held:
                self.begun.set()
                assert self.let.wait(LONG_S)
            copy(source, target)
            self.log.append(f"copied {step}")

        def reported(ctx, step, metrics) -> None:
            report(ctx, step, metrics)
            self.log.append(f"step {step}")
            if step == held + 1:
                assert self.begun.wait(LONG_S), "the copy goes on beside the step"

        def snapshot(folder, progress, *rest, **how) -> None:
            save(folder, progress, *rest, **how)
            self.log.append(f"snapshot {progress.step}")
            if progress.step == held + 2:
                self.let.set()

        monkeypatch.setattr(checkpoints, "replace_folder", slow)
        monkeypatch.setattr(LocalContext, "report", reported)
        monkeypatch.setattr(loops, "save_checkpoint", snapshot)


def test_a_slow_store_holds_up_the_next_checkpoint_and_no_step(job, tmp_path, monkeypatch):
    store, one = Store(monkeypatch, held=2), job()
    assert run_here(one, tmp_path / "scratch").status == "succeeded"
    order = {what: place for place, what in enumerate(store.log)}
    assert order["copy 2"] < order["step 4"] < order["snapshot 4"] < order["copied 2"] < order["copy 4"]
    assert order["step 3"] < order["copied 2"] and order["copied 4"] < order["copy 6"]
    assert saved(one) == [4, 6]
    for checkpoint in committed(run_folder(one)):
        step = read_sealed(checkpoint)["step"]
        assert json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))["step"] == step
        assert checkpoint.name == f"checkpoint-{step:08d}"
    assert not list((tmp_path / "scratch").iterdir()) and threads() == []


def test_switched_off_a_step_waits_for_its_checkpoint(job, tmp_path, monkeypatch):
    store = Store(monkeypatch)
    run_here(job(resources={}), tmp_path / "scratch")
    order = {what: place for place, what in enumerate(store.log)}
    assert all(order[f"copied {step}"] < order[f"step {step + 1}"] for step in (2, 4))


def test_an_interrupted_run_is_the_uninterrupted_one_bit_for_bit(job, tmp_path):
    straight, broken = job(name="straight", resources={}), job(name="broken")
    run_here(straight, tmp_path / "scratch")
    for stop_at in (3, 2, None):
        run_here(broken, tmp_path / "scratch", stop_at=stop_at)
    assert curve(broken) == curve(straight) and saved(broken) == [5, 6], "of the second stop, and of the end"
    first, second = (load_file(run_folder(one) / "adapter/adapter_model.safetensors") for one in (straight, broken))
    assert all((first[name] == second[name]).all() for name in first)


def test_asked_to_stop_it_ends_once_the_checkpoint_is_committed(job, tmp_path, monkeypatch):
    store, one = Store(monkeypatch), job(train__save_steps=100)
    assert run_here(one, tmp_path / "scratch", stop_at=3).status == "stopped"
    assert store.log[-1] == "copied 3" and saved(one) == [3]


def test_the_best_weights_are_there_before_the_checkpoint_that_names_them(job, tmp_path, monkeypatch):
    losses = iter([5.0, 4.0, 3.0, 6.0, 7.0, 8.0])
    monkeypatch.setattr(loops, "held_out_loss", lambda *_, **__: next(losses))
    copy, found = checkpoints.replace_folder, []

    def noted(source: Path, target: Path) -> None:
        copy(source, target)
        best = json.loads((target / "progress.json").read_text(encoding="utf-8"))["watch"]["best_step"]
        found.append((best, sorted(path.name for path in target.parent.glob("best-*"))))

    monkeypatch.setattr(checkpoints, "replace_folder", noted)
    one = job(train__eval_steps=1, train__save_steps=1, train__load_best_model_at_end=True)
    assert run_here(one, tmp_path / "scratch").metrics["train.best_step"] == 3
    names = [f"best-{step:08d}" for step in (1, 2, 3)]
    assert found == [(1, names[:1]), (2, names[:2]), (3, names[1:]), (3, names[2:]), (3, names[2:]), (3, names[2:])]
    kept = load_file(run_folder(one) / "adapter/adapter_model.safetensors")
    best = load_file(run_folder(one) / names[2] / "adapter_model.safetensors")
    assert all((kept[name] == best[name]).all() for name in best)


def run_with(patience: Patience, job, scratch: Path):
    return program.train(job, LocalContext(run_folder(job), scratch=scratch, patience=patience))


def full(at: int, monkeypatch) -> None:
    """The store is full from the checkpoint of step `at` on."""
    copy = checkpoints.replace_folder

    def replace(source: Path, target: Path) -> None:
        if int(target.name.rpartition("-")[2]) >= at:
            raise OSError(28, "No space left on device")
        copy(source, target)

    monkeypatch.setattr(checkpoints, "replace_folder", replace)


@pytest.mark.parametrize("at", [4, 6])
def test_a_store_that_stays_full_ends_the_run_and_names_what_is_safe(job, tmp_path, monkeypatch, at):
    one = job()
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="No space left") as caught:
        full(at, patch)
        run_with(Patience(total_s=0, say=lambda text: None), one, tmp_path / "scratch")
    assert f"checkpoint-{at - 2:08d} is good" in str(caught.value) and saved(one)[-1] == at - 2
    assert threads() == [] and not (run_folder(one) / "result.json").exists()
    assert run_here(one, tmp_path / "scratch").status == "succeeded" and saved(one) == [4, 6]
    assert [event["step"] for event in read_events(run_folder(one) / "events.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_store_that_comes_back_costs_nothing(job, tmp_path, monkeypatch):
    copy, said = checkpoints.replace_folder, []

    def replace(source: Path, target: Path) -> None:
        if not said:
            raise OSError(28, "No space left on device")
        copy(source, target)

    monkeypatch.setattr(checkpoints, "replace_folder", replace)
    one = job()
    result = run_with(Patience(say=said.append, sleep=lambda _: None), one, tmp_path / "scratch")
    assert result.status == "succeeded" and saved(one) == [4, 6] and len(said) == 2


def test_a_run_that_diverges_waits_for_the_commit_under_way(job, tmp_path, monkeypatch):
    store, real, write = Store(monkeypatch, held=2), Learner.step, loops.write_json

    def step(self, batches, **given):
        report = real(self, batches, **given)
        return StepReport(math.nan, 1.0, 1, 1) if given["step"] == 3 else report

    def diverged(path: Path, value: object) -> None:
        assert store.begun.wait(LONG_S) and saved(one) == []
        write(path, value)
        store.let.set()

    monkeypatch.setattr(Learner, "step", step)
    monkeypatch.setattr(loops, "write_json", diverged)
    one = job()
    with pytest.raises(DivergenceError):
        run_here(one, tmp_path / "scratch")
    assert saved(one) == [2] and threads() == []


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def ctx(tmp_path, said) -> LocalContext:
    return LocalContext(tmp_path / "run", scratch=tmp_path / "scratch", patience=Patience(total_s=0, say=said.append))


def snapshot(folder: Path, step: int) -> Snapshot:
    write_json(folder / "checkpoint" / "progress.json", {"step": step})
    return Snapshot(folder, Progress("key", step, 0, 0.0, {"best_step": None}))


def test_an_error_is_raised_at_the_next_look(ctx, monkeypatch):
    full(2, monkeypatch)
    with Commits(ctx, beside=True) as one:
        one.look()
        one.begin(snapshot(one.next_folder(), 1))
        one.wait()
        one.begin(snapshot(one.next_folder(), 2))
        with pytest.raises(CheckpointError, match="checkpoint-00000001 is good"):
            wait_until(one.look, "the error")
        one.look()
    assert [path.name for path in committed(ctx.folder)] == ["checkpoint-00000001"]


def test_another_error_comes_first_and_the_lost_checkpoint_is_said(ctx, said, monkeypatch):
    full(1, monkeypatch)
    with pytest.raises(ZeroDivisionError), Commits(ctx, beside=True) as one:
        one.begin(snapshot(one.next_folder(), 1))
        raise ZeroDivisionError
    assert "the checkpoint under way was not committed" in said[-1] and "No space left" in said[-1]
    assert threads() == []


def test_a_scratch_folder_that_is_full_is_named(ctx, monkeypatch):
    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lmray.context.seal", no_space)
    with pytest.raises(CheckpointError, match="there is no checkpoint yet") as caught, Commits(ctx, beside=True) as one:
        one.begin(snapshot(one.next_folder(), 1))
    assert f"{ctx.scratch} needs room" in str(caught.value) and not list(ctx.folder.glob("checkpoint-*"))


def test_the_lines_of_its_steps_are_on_disk_before_a_checkpoint(job, tmp_path, monkeypatch):
    copy, flush, durable = checkpoints.replace_folder, EventLog.flush, list[bool]()

    def flushed(log, **given) -> None:
        flush(log, **given)
        durable.append(given.get("durable", False))

    def replace(source: Path, target: Path) -> None:
        step = int(target.name.rpartition("-")[2])
        lines = [event["step"] for event in read_events(target.parent / "events.jsonl")]
        assert lines[:step] == list(range(1, step + 1)) and sum(durable) == step // 2
        copy(source, target)

    monkeypatch.setattr(EventLog, "flush", flushed)
    monkeypatch.setattr(checkpoints, "replace_folder", replace)
    assert run_here(job(), tmp_path / "scratch").status == "succeeded"


def save_as(ctx, placed, patience: Patience, folder: Path) -> None:
    adapter = SimpleNamespace(resume_state=lambda model: {})
    write = partial(patience, "writing it", hint="")
    save_checkpoint(folder, Progress("key", 1, 0, 0.0), placed, adapter, ctx, write=lambda act: write(write=act))


@pytest.mark.parametrize(("alone", "ranks", "times"), [(True, 2, 2), (False, 1, 2), (False, 2, 1)])
def test_what_ranks_save_together_none_saves_again_alone(tmp_path, alone, ranks, times):
    calls = list[Path]()

    def save(folder: Path) -> None:
        calls.append(folder)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")

    placed = SimpleNamespace(saves_alone=alone, save=save, model=None)
    ctx = SimpleNamespace(rank=0, world_size=ranks)
    patience = Patience(say=lambda text: None, sleep=lambda _: None)
    if times == 1:
        with pytest.raises(OSError, match="No space left"):
            save_as(ctx, placed, patience, tmp_path / "part")
    else:
        save_as(ctx, placed, patience, tmp_path / "part")
        assert (tmp_path / "part" / "progress.json").is_file()
    assert len(calls) == times


def test_a_write_that_failed_is_done_again_without_the_ranks_meeting_again(tmp_path, monkeypatch):
    met, said = list[Path](), list[str]()

    def full_once(path: Path, value: object) -> None:
        if not said:
            raise OSError(28, "No space left on device")
        write_json(path, value)

    monkeypatch.setattr("lmray.train.checkpoint.write_json", full_once)
    placed = SimpleNamespace(saves_alone=False, save=met.append, model=None)
    ctx = SimpleNamespace(rank=0, world_size=2)
    save_as(ctx, placed, Patience(say=said.append, sleep=lambda _: None), tmp_path / "part")
    assert met == [tmp_path / "part"] and (tmp_path / "part" / "progress.json").is_file() and len(said) == 2


def test_an_error_is_raised_where_the_next_one_begins_which_is_not_begun(ctx, monkeypatch):
    full(1, monkeypatch)
    with Commits(ctx, beside=True) as one:
        one.begin(snapshot(one.next_folder(), 1))
        with pytest.raises(CheckpointError, match=r"checkpoint-00000001: failed .*No space left"):
            one.begin(snapshot(one.next_folder(), 2))
        one.wait()
