"""The next step's batches are made while this step computes: the same ones, in the same order, and no thread stays."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from lmray.artifacts.store import run_folder
from lmray.data.batch import collate
from lmray.data.sampler import Sampler
from lmray.data.tokenise import Tokenised
from lmray.errors import DataError, DivergenceError
from lmray.models.load import pad_token_id
from lmray.models.sizes import eighths
from lmray.testing.jobs import curve, run_here, tiny_job
from lmray.train import loop as loops
from lmray.train.feed import Feed
from lmray.train.learner import Learner
from lmray.train.prepare import prepare

LONG_S = 60.0
"""What never happens has not happened by then."""


def own_threads() -> list[str]:
    """Training's; a gateway that was tested before keeps some of its own."""
    found = [one.name for one in threading.enumerate() if one.name.startswith("lmray-")]
    return [name for name in found if not name.startswith("lmray-tokenise")]


def test_the_next_one_is_made_while_the_caller_has_this_one():
    begun, go_on = threading.Event(), threading.Event()

    def make(one: int) -> int:
        if one == 2:
            begun.set()
            assert go_on.wait(LONG_S)
        return 10 * one

    with Feed(make, [1, 2, 3], device="cpu") as feed:
        assert next(feed) == 10
        assert begun.wait(LONG_S)
        go_on.set()
        assert list(feed) == [20, 30] and list(feed) == []
    assert own_threads() == []


def test_an_error_is_raised_where_what_it_makes_is_due():
    def make(one: int) -> float:
        return 6 / one

    with Feed(make, [1, 2, 0, 3], device="cpu") as feed:
        assert [next(feed), next(feed)] == [6.0, 3.0]
        with pytest.raises(ZeroDivisionError):
            next(feed)
    assert own_threads() == []


def test_the_block_ends_after_its_thread():
    order, begun, left = list[str](), threading.Event(), threading.Event()

    def make(one: int) -> None:
        if one == 2:
            begun.set()
            left.wait(0.1)  # in vain: the block waits for this
            order.append("made")

    with Feed(make, [1, 2, 3], device="cpu") as feed:
        next(feed)
        assert begun.wait(LONG_S)
    order.append("left")
    left.set()
    assert order == ["made", "left"] and own_threads() == []


def test_nothing_is_asked_of_what_is_empty():
    with Feed(str, [], device="cpu") as feed:
        assert list(feed) == []
        assert own_threads() == []


def test_the_thread_makes_on_the_callers_gpu(monkeypatch):
    chosen: list[tuple[str, str]] = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: chosen.append((threading.current_thread().name, device))
    )
    with Feed(str, [1, 2], device="cuda:1") as feed:
        assert list(feed) == ["1", "2"]
    ((thread, device),) = chosen
    assert thread.startswith("lmray-feed") and device == "cuda:1"


def test_a_batch_is_pinned_whole(monkeypatch):
    example = Tokenised(np.array([5, 6, 7]), np.array([-100, 6, 7]))
    batch = collate([(example,), (example,)], pad_token_id=0)
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda one: (pinned.append(one), one.clone())[1])
    found = batch.pin_memory()
    assert pinned == [batch.input_ids_BT, batch.position_ids_BT, batch.labels_BT]
    assert torch.equal(found.labels_BT, batch.labels_BT) and found.num_supervised == 4 and found.lengths == ((3,), (3,))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_is_pinned_arrives():
    example = Tokenised(np.arange(1000), np.arange(1000))
    batch = collate([(example,)] * 8, pad_token_id=0)
    pinned = batch.pin_memory()
    assert pinned.input_ids_BT.is_pinned() and torch.equal(pinned.to("cuda").input_ids_BT.cpu(), batch.input_ids_BT)


@pytest.fixture
def job(tiny_model, tiny_data, tmp_path):
    return lambda **changes: tiny_job(tiny_model, tiny_data, tmp_path / "store", **changes)


@pytest.fixture
def seen(monkeypatch) -> list[list[torch.Tensor]]:
    """Token ids of the micro-batches of every step there was."""
    steps: list[list[torch.Tensor]] = []
    real = Learner.step

    def step(self, batches, **given):
        steps.append([batch.input_ids_BT for batch in batches])
        return real(self, batches, **given)

    monkeypatch.setattr(Learner, "step", step)
    return steps


def same(found: list[list[torch.Tensor]], expected: list[list[torch.Tensor]]) -> bool:
    alike = [len(ours) == len(theirs) for ours, theirs in zip(found, expected, strict=True)]
    pairs = [pair for ours, theirs in zip(found, expected, strict=True) for pair in zip(ours, theirs, strict=False)]
    return all(alike) and all(torch.equal(*pair) for pair in pairs)


def test_steps_get_the_rows_that_the_sampler_says_also_after_a_stop(job, seen, tmp_path):
    changes = {"train__per_device_train_batch_size": 2, "train__gradient_accumulation_steps": 2}
    changes |= {"train__max_steps": None, "train__num_train_epochs": 1.7, "model__kernels": "plain"}
    one = job(**changes)
    assert run_here(one, tmp_path / "scratch", stop_at=3).status == "stopped"
    assert len(seen) == 3 and run_here(one, tmp_path / "scratch").status == "succeeded"
    ready = prepare(one)
    rows = Sampler(len(ready.rows), one.train.seed).rows(0, round(1.7 * len(ready.rows)))
    pad = pad_token_id(ready.tokenizer)
    parts = [rows[first : first + 4] for first in range(0, len(rows), 4)]
    cut = [[part[first : first + 2] for first in range(0, len(part), 2)] for part in parts]

    def made(micro: list[int]) -> torch.Tensor:
        return collate([ready.rows[row] for row in micro], pad_token_id=pad, padded=eighths).input_ids_BT

    expected = [[made(micro) for micro in step] for step in cut]
    assert same(seen, expected)
    assert len(seen[-1]) < 2 or len(seen[-1][-1]) < 2, "the last step is short, else the test says less"


def at_step(number: int, real: Callable, act: Callable[[], object]) -> Callable:
    """`real`, which does `act` first where it is called for the `number`th time."""
    calls = iter(range(1, 10**6))

    def called(*args, **given):
        if next(calls) == number:
            act()
        return real(*args, **given)

    return called


def test_rows_that_cannot_be_read_end_the_run_in_the_step_that_needs_them(job, tmp_path, monkeypatch):
    def unreadable() -> None:
        raise DataError("rows.jsonl", "cannot be read")

    one = job()
    with monkeypatch.context() as patch, pytest.raises(DataError, match="cannot be read"):
        patch.setattr(loops, "collate", at_step(4, collate, unreadable))
        run_here(one, tmp_path / "scratch")
    assert len(curve(one)) == 3 and own_threads() == []
    straight = job(name="straight")
    assert run_here(one, tmp_path / "scratch").status == run_here(straight, tmp_path / "scratch").status == "succeeded"
    assert curve(one) == curve(straight)


class Killed(BaseException):
    pass


def kill() -> None:
    raise Killed


@pytest.mark.parametrize("ending", ["at the end", "stopped", "early", "diverged", "killed"])
def test_no_thread_stays_however_a_run_ends(job, tmp_path, monkeypatch, ending):
    changes = {"train__eval_steps": 1, "train__early_stopping_patience": 1, "train__early_stopping_threshold": 100.0}
    one = job(resources={"async_checkpoints": True}, **(changes if ending == "early" else {}))
    real, stop_at = Learner.step, 3 if ending == "stopped" else None

    def step(self, batches, **given):
        assert any(name.startswith("lmray-feed") for name in own_threads())
        report = real(self, batches, **given)
        if ending == "diverged" and given["step"] == 3:
            return loops.StepReport(math.nan, 1.0, 1, 1)
        return report

    monkeypatch.setattr(Learner, "step", at_step(3, step, kill) if ending == "killed" else step)
    raised = {"diverged": DivergenceError, "killed": Killed}.get(ending)
    if raised:
        with pytest.raises(raised):
            run_here(one, tmp_path / "scratch", stop_at=stop_at)
    else:
        run_here(one, tmp_path / "scratch", stop_at=stop_at)
    assert own_threads() == []
    assert len(curve(one)) == {"at the end": 6, "stopped": 3, "early": 2, "diverged": 2, "killed": 2}[ending]
    assert any(run_folder(one).glob("checkpoint-*"))
