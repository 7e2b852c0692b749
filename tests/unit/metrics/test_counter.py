import io

from lmray.metrics.counter import Counter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(times: list[float], stream: io.StringIO) -> str:
    """What a loop over `times` prints, one thing done at each; it begins at 0."""
    now = 0.0
    with Counter("tokenise", len(times), unit="examples", stream=stream, clock=lambda: now) as counter:
        for done, now in enumerate(times, start=1):  # noqa: B007
            counter.at(done)
    return stream.getvalue()


def test_a_short_loop_shows_nothing():
    assert shown([0.5, 1, 1.5, 2], io.StringIO()) == ""


def test_a_long_loop_says_how_far_it_is_and_ends_with_the_whole():
    lines = shown([1, 4, 5, 8], io.StringIO()).splitlines()
    assert lines == [
        "tokenise 2/4  0 examples a second  4.0 s gone, 4.0 s left",
        "tokenise 4/4  0 examples a second  8.0 s gone, 0.0 s left",
    ]


def test_a_terminal_gets_a_bar():
    text = shown([1, 4, 5, 8], Terminal())
    assert "tokenise" in text and "4/4" in text and "gone" not in text


def test_where_the_whole_is_not_known_what_is_done_is_counted():
    stream, now = io.StringIO(), 0.0
    with Counter("read", None, unit="rows", stream=stream, clock=lambda: now) as counter:
        for done, now in ((1000, 4.0), (1500, 6.0)):  # noqa: B007
            counter.at(done)
    assert stream.getvalue().splitlines() == [
        "read 1,000/?  250 rows a second  4.0 s gone",
        "read 1,500/?  250 rows a second  6.0 s gone",
    ]
