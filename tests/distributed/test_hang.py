"""A rank that hangs ends all of them, each with its stacks, and the run goes on from its checkpoint."""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path

import pytest

from lmray.artifacts.checkpoints import committed
from lmray.artifacts.store import run_folder
from lmray.context import Result
from lmray.methods import sft
from lmray.metrics.events import read_attempts, read_events
from lmray.pulse import PULSE
from lmray.testing.jobs import curve, run_here, tiny_job
from lmray.testing.ranks import outcomes, train_ranks
from lmray.train import hang
from lmray.train.group import torchrun_context
from lmray.train.program import train

sft_loss = sft.sft_loss


@pytest.fixture
def job(tiny_model, tiny_data, tmp_path):
    def make(timeout_s: float | None, workers: int = 2, **changes):
        changes = {"resources": {"workers": workers, "step_timeout_s": timeout_s}, "train__save_steps": 2, **changes}
        return tiny_job(tiny_model, tiny_data, tmp_path / "store", **changes)

    return make


HANGS, look = threading.Event(), hang.Watchdog.look


def never_comes_back(model, batch):
    if PULSE.step == 4:
        HANGS.set()
        threading.Event().wait()
    return sft_loss(model, batch)


def loses_patience(watchdog: hang.Watchdog) -> str | None:
    """Once it hangs, and no sooner: how long steps take here says nothing."""
    if HANGS.is_set():
        watchdog.timeout_s = 1.0
    return look(watchdog)


def _hanging(rank: int, job) -> Result:
    hang.LONGEST_LOOK_S = 0.5
    if rank == 1:
        sft.sft_loss, hang.Watchdog.look = never_comes_back, loses_patience
    with torchrun_context(run_folder(job)) as ctx:
        return train(job, ctx)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_a_rank_that_hangs_ends_all_with_their_stacks_and_the_run_goes_on(job, tmp_path, sharding):
    one = job(120.0, sharding=sharding)
    found = outcomes(2, _hanging, one)
    assert [str(end) for end in found] == [f"exit code {hang.HUNG}"] * 2
    folder = run_folder(one)
    waiting, hanging = ((folder / f"stacks-{rank}.txt").read_text(encoding="utf-8") for rank in (0, 1))
    assert hanging.startswith("rank 1 of 2 at step 4, micro-batch 1 of 1: ") and "in never_comes_back" in hanging
    assert waiting.startswith("rank 0 of 2 at step 4, ") and "in never_comes_back" not in waiting
    assert "torch/distributed" in waiting, "it waits in a collective"
    assert [path.name for path in committed(folder)] == ["checkpoint-00000002"]
    again = one.changed({"sharding": "single", "resources.workers": 1, "resources.step_timeout_s": None})
    straight = again.model_copy(update={"name": "straight"}).changed({"train.per_device_train_batch_size": 8})
    run_here(straight, tmp_path / "scratch")
    assert train_ranks(again).status == "succeeded"
    assert curve(again) == pytest.approx(curve(straight), abs=1e-5)
    assert not hang.stacks(folder) and (folder / "earlier-stacks-1.txt").is_file()
    events = read_events(folder / "events.jsonl")
    assert [(event["step"], event["attempt"], event["world_size"]) for event in events] == [
        *((step, 1, 2) for step in (1, 2)),
        *((step, 2, 1) for step in (3, 4, 5, 6)),
    ]
    assert [event["step"] for event in events if event.get("replayed")] == [3]
    assert [event["train.samples"] for event in events] == [8, 16, 24, 32, 40, 48]
    assert [attempt.reported for attempt in read_attempts(folder)] == [0, 3]


def holds_the_lock(model, batch):
    """As an extension does that waits and never lets go of Python's lock."""
    ctypes.PyDLL(None).sleep(1000)


def _holding(rank: int, job, log: Path) -> None:
    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY), 2)
    sft.sft_loss, hang.GRACE_S = holds_the_lock, 1.0
    with torchrun_context(run_folder(job)) as ctx:
        train(job, ctx)


def test_a_process_in_which_no_thread_can_run_any_more_ends_with_its_stacks(job, tmp_path):
    (end,) = outcomes(1, _holding, job(6.0, 1), tmp_path / "stderr")
    assert str(end) == "exit code 1"
    assert "in holds_the_lock" in (tmp_path / "stderr").read_text(encoding="utf-8")
