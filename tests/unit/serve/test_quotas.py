"""What a key has used of what it may, on a clock of our own."""

from __future__ import annotations

from contextlib import suppress

import pytest

from lmray.serve.failures import AnswerError
from lmray.serve.keys import ApiKey
from lmray.serve.quotas import DAY_S, Quotas, Window


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def use(quotas: Quotas, key: ApiKey, num_tokens: int = 0) -> int:
    """Seconds that a request of `key` is told to wait; 0 where it passed."""
    try:
        with quotas.using(key, lambda: num_tokens):
            return 0
    except AnswerError as error:
        assert error.status == 429
        assert error.body["error"]["code"] == "rate_limit_exceeded"
        return int(error.headers["Retry-After"])


@pytest.fixture
def clock() -> Clock:
    return Clock()


def key(**limits) -> ApiKey:
    return ApiKey(name="a", sha256="0" * 64, **limits)


def test_a_window_sums_what_is_not_too_old_and_says_when_there_is_room():
    window = Window(limit=10, span_s=60.0)
    window.add(0.0, 4)
    window.add(30.0, 5)
    assert window.wait_s(30.0) == 0.0
    window.add(30.5, 5)
    assert window.wait_s(31.0) == 60.0  # ten are left when the first four leave at 61 s, and ten is the limit
    assert window.wait_s(61.0) == 30.0
    assert window.wait_s(91.0) == 0.0


def test_requests_per_minute(clock):
    mine = key(requests_per_minute=2)
    quotas = Quotas((mine,), clock)
    assert [use(quotas, mine) for _ in range(3)] == [0, 0, 61]
    clock.now_s += 61
    assert use(quotas, mine) == 0


@pytest.mark.parametrize(("field", "span_s"), [("tokens_per_minute", 60.0), ("tokens_per_day", DAY_S)])
def test_tokens_count_once_an_answer_is_done(clock, field, span_s):
    mine = key(**{field: 100})
    quotas = Quotas((mine,), clock)
    assert use(quotas, mine, num_tokens=99) == 0
    assert use(quotas, mine, num_tokens=50) == 0
    wait_s = use(quotas, mine)
    assert span_s < wait_s <= span_s * (1 + 1 / 60) + 1
    clock.now_s += wait_s
    assert use(quotas, mine) == 0


def test_requests_at_once_are_given_back_however_they_end(clock):
    mine, other = key(max_concurrent_requests=1), ApiKey(name="b", sha256="1" * 64)
    quotas = Quotas((mine, other), clock)
    with suppress(ZeroDivisionError), quotas.using(mine, lambda: 0):
        assert use(quotas, mine) == 1
        assert use(quotas, other) == 0
        raise ZeroDivisionError
    assert use(quotas, mine) == 0
