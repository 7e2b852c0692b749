import io

from lmray.metrics.counter import Counter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(times: list[float], stream: io.StringIO) -> str:
    """What a loop of four over `times` prints; the first time is the start."""
    clock = iter(times)
    counter = Counter("tokenise", 4, unit="examples", stream=stream, clock=lambda: next(clock))
    for done in range(1, len(times)):
        counter.at(done)
    return stream.getvalue()


def test_a_short_loop_shows_nothing():
    assert shown([0, 0.5, 1, 1.5, 2], io.StringIO()) == ""


def test_a_long_loop_says_how_far_it_is_and_ends_with_the_whole():
    lines = shown([0, 1, 4, 5, 8], io.StringIO()).splitlines()
    assert lines == [
        "tokenise 2/4 examples  0 a second  4.0 s gone, 4.0 s left",
        "tokenise 4/4 examples  0 a second  8.0 s gone, 0.0 s left",
    ]


def test_on_a_terminal_one_line_is_written_over():
    text = shown([0, 1, 4, 5, 8], Terminal())
    assert text.count("\r") == 3 and text.count("\n") == 1 and text.endswith("\n")


def test_where_the_whole_is_not_known_what_is_done_is_counted():
    stream, clock = io.StringIO(), iter([0, 4, 6])
    counter = Counter("read", None, unit="rows", stream=stream, clock=lambda: next(clock))
    counter.at(1000)
    counter.at(1500, last=True)
    assert stream.getvalue().splitlines() == [
        "read 1,000 rows  250 a second  4.0 s gone",
        "read 1,500 rows  250 a second  6.0 s gone",
    ]
