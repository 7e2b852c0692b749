"""The display that training, evaluation, sweeps and tokenising share."""

from __future__ import annotations

import io

import pytest

from lmray.metrics.display import Bar, Lines, Standing, followed, make_display


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock():
    return Clock()


def test_plain_lines(clock):
    stream = io.StringIO()
    lines = Lines(stream, clock=clock)
    for done in (1, 2, 3):
        lines.show(Standing("base: answers", done, 60))
    clock.now = 70.0
    lines.show(Standing("base: answers", 12, 60))
    lines.show(Standing("base: answers", 60, 60))
    lines.show(Standing("tuned: answers", 1, 60))
    lines.close()
    shown = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in shown] == [
        "base: answers 1/60",
        "base: answers 12/60",
        "base: answers 60/60",
        "tuned: answers 1/60",
    ]
    assert shown[1].endswith("gone")


def test_a_bar_for_each_thing_done():
    stream = io.StringIO()
    bar = Bar(stream)
    bar.show(Standing("base: loss", 1, 2))
    bar.show(Standing("base: answers", 5, 60))
    bar.show(Standing("base: answers", 60, 60))
    bar.close()
    assert "base: answers" in stream.getvalue() and "60/60" in stream.getvalue() and "base: loss" in stream.getvalue()


def test_a_closed_display_has_printed_the_last_standing_once(clock):
    stream = io.StringIO()
    lines = Lines(stream, clock=clock)
    for done in (1, 2):
        lines.show(Standing("step", done, 3))
    lines.close()
    lines.close()
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/3", "2/3"]


def test_what_is_not_known_is_not_claimed():
    assert Standing("step", 1200, None).line(1.0) == "step 1,200/?  1.0 s gone"


def test_the_stream_decides():
    assert isinstance(make_display(Terminal()), Bar) and isinstance(make_display(io.StringIO()), Lines)


def test_a_bar_shows_facts_and_the_time_left():
    stream = Terminal()
    bar = Bar(stream)
    bar.show(Standing("step", 2, 4, "loss 1.5", 3.0))
    bar.show(Standing("step", 4, 4, "loss 1.2", 0.0))
    bar.close()
    assert "4/4" in stream.getvalue() and "loss 1.2" in stream.getvalue()


def test_followed_shows_the_end_and_closes_also_where_the_block_fails():
    stream, done = io.StringIO(), 0
    with pytest.raises(ValueError, match="broken"), followed(lambda: Standing("trials", done, 8), stream=stream):
        done = 5
        raise ValueError("broken")
    assert stream.getvalue().splitlines()[-1].startswith("trials 5/8")
