"""Looking at something beside other work."""

from __future__ import annotations

import threading

from lmray.metrics.looking import looking

NEVER_S = 3600.0


def test_the_last_look_comes_after_the_block():
    state, seen = ["begun"], []
    with looking(lambda: seen.append(state[-1]), every_s=NEVER_S, name="looks"):
        state.append("done")
    assert seen == ["done"]
    assert "looks" not in {thread.name for thread in threading.enumerate()}


def test_it_looks_while_the_block_runs():
    looked = threading.Event()
    with looking(looked.set, every_s=0.001, name="looks"):
        assert looked.wait(60)


def test_a_look_that_hangs_is_not_waited_for():
    let_go = threading.Event()
    with looking(let_go.wait, every_s=NEVER_S, name="hangs", wait_s=0.0):
        pass
    (thread,) = (one for one in threading.enumerate() if one.name == "hangs")
    let_go.set()
    thread.join()
