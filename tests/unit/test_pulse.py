"""A process's signs of life."""

from __future__ import annotations

import threading

import pytest

from lmray.pulse import Pulse


def test_a_beat_says_what_is_done_and_keeps_the_step():
    pulse = Pulse()
    pulse.beat("its batches", step=7)
    pulse.beat("micro-batch 1 of 2")
    assert (pulse.beats, pulse.step, pulse.doing) == (2, 7, "micro-batch 1 of 2")


def test_it_waits_until_all_who_wait_are_done():
    pulse = Pulse()
    with pytest.raises(OSError, match="away"), pulse.waiting("the store"):
        with pulse.waiting("hearing rank 0"):
            assert pulse.waits
        assert pulse.waits
        raise OSError("away")
    assert not pulse.waits and pulse.doing == "after the store"


def test_threads_that_wait_at_once_are_all_counted():
    pulse, ready = Pulse(), threading.Barrier(9)

    def wait() -> None:
        for _ in range(200):
            with pulse.waiting("something"):
                pass
        ready.wait(60)

    for thread in [threading.Thread(target=wait, daemon=True) for _ in range(8)]:
        thread.start()
    ready.wait(60)
    assert not pulse.waits
