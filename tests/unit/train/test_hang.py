"""What counts as a hang, and what is left of one. Time is counted by hand."""

from __future__ import annotations

import faulthandler
import threading
from pathlib import Path

import pytest

from lmray.artifacts.patience import Patience
from lmray.artifacts.store import run_folder
from lmray.context import LocalContext
from lmray.errors import CheckpointError, ConfigError
from lmray.job import TrainJob
from lmray.pulse import PULSE, Pulse
from lmray.testing.jobs import run_here, tiny_job
from lmray.train.group import collective_timeout
from lmray.train.hang import (
    GRACE_S,
    HUNG,
    LONGEST_LOOK_S,
    NUM_SHOWN,
    Watchdog,
    hang_error,
    set_aside,
    stacks,
    watched,
)
from lmray.train.plan import make_plan

TIMEOUT_S = 20.0


@pytest.fixture(autouse=True)
def _timer_is_stopped():
    """A watchdog that ends its process winds up the timer that would end this one."""
    yield
    faulthandler.cancel_dump_traceback_later()


class Rank:
    """A rank with its watchdog, whose time passes when it is told to."""

    def __init__(self, folder: Path, *, rank: int = 0, world_size: int = 1):
        self.now, self.said, self.ended = 0.0, [], []
        self.pulse = Pulse()
        self.ctx = LocalContext(folder / "run", scratch=folder / "scratch", patience=Patience(say=self.said.append))
        self.ctx.rank, self.ctx.world_size = rank, world_size
        self.dog = Watchdog(
            self.ctx, TIMEOUT_S, pulse=self.pulse, clock=lambda: self.now, sleep=self.pass_time, end=self.ended.append
        )

    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    def looks(self, seconds: float) -> str | None:
        """What the watchdog finds in so much time."""
        for _ in range(round(seconds / self.dog.look_s)):
            self.pass_time(self.dog.look_s)
            if (why := self.dog.look()) is not None:
                return why
        return None


@pytest.fixture
def rank(tmp_path) -> Rank:
    return Rank(tmp_path)


def test_silence_as_long_as_the_timeout_is_a_hang(rank):
    rank.pulse.beat("micro-batch 1 of 4")
    assert rank.looks(TIMEOUT_S) is None, "the silence is shorter than the time since"
    assert rank.looks(rank.dog.look_s) == "no progress for 20.0 s"


def test_a_slow_step_that_moves_is_none(rank):
    for number in range(100):
        rank.pulse.beat(f"micro-batch {number} of 100")
        assert rank.looks(TIMEOUT_S - rank.dog.look_s) is None


def test_waiting_for_what_has_a_limit_of_its_own_is_none(rank):
    with rank.pulse.waiting("hearing rank 0"):
        assert rank.looks(7000) is None
    assert rank.looks(TIMEOUT_S) is None
    assert rank.looks(rank.dog.look_s) is not None


def test_a_process_that_was_stopped_does_not_count_that_time(rank):
    rank.looks(5.0)
    rank.pass_time(10_000)
    assert rank.dog.look() is None


def test_waiting_for_a_store_is_none():
    slept, waits = [], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        waits.append(PULSE.waits)

    def away() -> None:
        raise OSError(28, "No space left on device")

    patience = Patience(say=lambda text: None, clock=lambda: sum(slept), sleep=sleep)
    with pytest.raises(CheckpointError, match="No space left"):
        patience("writing x", away, hint="wait")
    assert len(waits) > 10 and all(waits) and not PULSE.waits


def test_a_rank_that_waits_follows_one_that_hangs_and_one_that_moves_does_not(tmp_path):
    first, other = Rank(tmp_path, rank=1, world_size=2), Rank(tmp_path, rank=0, world_size=2)
    first.dog.leave("no progress for 20.0 s")
    for number in range(20):
        other.pulse.beat(str(number))
        assert other.looks(other.dog.look_s) is None
    why = other.looks(other.dog.look_s)
    assert why == "followed rank 1, after 5.0 s without progress"
    other.dog.leave(why)
    assert list(stacks(other.ctx.folder)) == [0, 1]
    assert len(first.said) == 1 and other.said == [], "one line a hang"
    assert first.ended == other.ended == [HUNG]


def waits_for_ever(here: threading.Event, over: threading.Event) -> None:
    here.set()
    over.wait()


def test_the_stacks_of_all_threads_are_left_that_of_the_training_first(rank):
    here, over = threading.Event(), threading.Event()
    thread = threading.Thread(target=waits_for_ever, args=(here, over), name="batches", daemon=True)
    thread.start()
    here.wait()
    rank.pulse.beat("micro-batch 2 of 4", step=7)
    dog = threading.Thread(target=rank.dog.leave, args=("no progress for 20.0 s",))
    dog.start()
    dog.join()
    over.set()
    text = (rank.ctx.folder / "stacks-0.txt").read_text(encoding="utf-8")
    head, _, first, *_ = text.splitlines()
    assert head == "rank 0 of 1 at step 7, micro-batch 2 of 4: no progress for 20.0 s"
    assert first == "Thread MainThread, which trains:"
    assert "in test_the_stacks_of_all_threads" in text and "Thread batches:" in text and "in waits_for_ever" in text
    assert "in _leave" not in text, "its own stack is of no use"
    (line,) = rank.said
    assert "rank 0 of 1 at step 7" in line and str(rank.ctx.folder / "stacks-0.txt") in line
    assert rank.ended == [HUNG]


def test_a_rank_that_leaves_no_stacks_is_waited_for_no_longer_than_the_grace(tmp_path):
    rank = Rank(tmp_path, rank=1, world_size=2)
    rank.dog.leave("no progress for 20.0 s")
    assert rank.now == pytest.approx(GRACE_S, abs=1.0) and rank.ended == [HUNG]


def test_it_ends_where_nothing_can_be_written_or_said(rank, capsys):
    rank.ctx.folder.rmdir()
    rank.ctx.folder.write_text("in the way")

    def broken(text: str) -> None:
        raise ConnectionError("the cluster is gone")

    rank.ctx.patience.say = broken
    with pytest.raises(ConnectionError):
        rank.dog.leave("no progress for 20.0 s")
    assert rank.ended == [HUNG]
    said = capsys.readouterr().err
    assert "stacks-0.txt cannot be written" in said and "rank 0 of 1 at step 0, starting: no progress" in said


def test_the_error_names_step_ranks_and_files(tmp_path):
    assert hang_error("tiny", tmp_path) is None
    for rank in range(NUM_SHOWN + 8):
        (tmp_path / f"stacks-{rank}.txt").write_text(f"rank {rank} of 12 at step 7, its batches: why\n\nThread\n")
    (tmp_path / "stacks-of-mine.txt").write_text("another's")
    error = hang_error("tiny", tmp_path)
    assert error is not None and error.exit_code == 1 and error.where == "run `tiny`"
    assert "rank 3 of 12 at step 7, its batches: why; and 8 more ranks" in error.found
    assert str(tmp_path / "stacks-3.txt") in str(error.hint) and "step_timeout_s" in str(error.hint)
    set_aside(tmp_path)
    assert hang_error("tiny", tmp_path) is None
    assert (tmp_path / "earlier-stacks-11.txt").is_file() and (tmp_path / "stacks-of-mine.txt").is_file()


def test_the_watchdog_is_there_for_the_block_and_never_without_a_timeout(tmp_path):
    def there() -> bool:
        return "lmray-watchdog" in {thread.name for thread in threading.enumerate()}

    ctx = LocalContext(tmp_path / "run", scratch=tmp_path / "scratch")
    with watched(ctx, None):
        assert not there()
    with watched(ctx, 1000.0):
        assert there()
    assert not there()


@pytest.mark.parametrize("timeout_s", [None, 1.0, TrainJob.model_fields["resources"].default.step_timeout_s, 7200.0])
def test_a_collective_waits_until_the_watchdog_had_its_say(timeout_s):
    assert collective_timeout(timeout_s).total_seconds() > (timeout_s or 0) + 2 * LONGEST_LOOK_S + GRACE_S


@pytest.fixture
def job(tiny_model, tiny_data, tmp_path):
    return lambda **changes: tiny_job(tiny_model, tiny_data, tmp_path / "store", **changes)


def test_every_micro_batch_held_out_batch_and_file_of_a_checkpoint_is_a_sign_of_life(job, tmp_path, monkeypatch):
    seen: list[tuple[int, str]] = []
    beat = Pulse.beat

    def heard(self, doing: str, *, step: int | None = None) -> None:
        beat(self, doing, step=step)
        seen.append((self.step, doing))

    monkeypatch.setattr(Pulse, "beat", heard)
    changes = {"train__per_device_train_batch_size": 1, "train__gradient_accumulation_steps": 2}
    changes |= {"train__max_steps": 2, "train__save_steps": 1, "train__eval_steps": 1}
    run_here(job(**changes), tmp_path / "scratch")
    for step in (1, 2):
        did = [doing for at, doing in seen if at == step]
        order = ["its batches", "micro-batch 1 of 2", "micro-batch 2 of 2", "the optimizer's step"]
        assert did[:4] == order and did[4:6] == ["held-out row 1 of 2", "held-out row 2 of 2"]
        assert "its checkpoint" in did and any("weights.safetensors" in one for one in did)


def test_how_long_a_step_may_hang_is_no_part_of_a_runs_identity(job):
    keys = {make_plan(job(resources={"step_timeout_s": one})).run_key for one in (None, 60.0, 1800.0)}
    assert len(keys) == 1 and not run_folder(job()).exists()


@pytest.mark.parametrize("value", [0, -1.0, "soon"])
def test_a_timeout_that_makes_no_sense_is_refused(job, value):
    with pytest.raises(ConfigError, match="step_timeout_s"):
        job(resources={"step_timeout_s": value})
