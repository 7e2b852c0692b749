"""What each key has used of what it may: requests a minute, requests at once, tokens a minute and a day.

Kept in the gateway's memory: a gateway that starts again starts counting again.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lmray.serve.failures import AnswerError, RequestError, error_body
from lmray.serve.keys import ApiKey

MINUTE_S, DAY_S = 60.0, 86_400.0
_SLOTS = 60


class Window:
    """A sum over the last `span_s` seconds, in slots of a sixtieth of that."""

    def __init__(self, limit: int, span_s: float):
        self.limit, self._span_s = limit, span_s
        self._slot_s = span_s / _SLOTS
        self._slots: deque[tuple[int, int]] = deque()

    def add(self, now_s: float, amount: int) -> None:
        slot = int(now_s // self._slot_s)
        if self._slots and self._slots[-1][0] == slot:
            amount += self._slots.pop()[1]
        self._slots.append((slot, amount))

    def wait_s(self, now_s: float, amount: int = 1) -> float:
        """Seconds until there is room for `amount`, at most the limit; 0 where there is."""
        while self._slots and self._leaves_s(self._slots[0][0]) <= now_s:
            self._slots.popleft()
        total = sum(amount for _, amount in self._slots)
        for slot, used in self._slots:
            if total + amount <= self.limit:
                break
            total -= used
            if total + amount <= self.limit:
                return self._leaves_s(slot) - now_s
        return 0.0

    def _leaves_s(self, slot: int) -> float:
        return (slot + 1) * self._slot_s + self._span_s


class Quota:
    """What one key has used."""

    def __init__(self, key: ApiKey):
        self._most_at_once = key.max_concurrent_requests
        self._running = 0
        self._requests = _windows(("requests_per_minute", key.requests_per_minute, MINUTE_S))
        self._tokens = _windows(
            ("tokens_per_minute", key.tokens_per_minute, MINUTE_S), ("tokens_per_day", key.tokens_per_day, DAY_S)
        )

    def enter(self, now_s: float) -> None:
        """Counts a request in. Raises AnswerError (429) where the key has used what it may."""
        if self._most_at_once is not None and self._running >= self._most_at_once:
            raise _used_up("max_concurrent_requests", self._most_at_once, 1.0)
        for name, window in {**self._requests, **self._tokens}.items():
            if (wait_s := window.wait_s(now_s)) > 0:
                raise _used_up(name, window.limit, wait_s)
        self._running += 1
        for window in self._requests.values():
            window.add(now_s, 1)

    def take(self, now_s: float, num_tokens: int) -> None:
        """Counts a prompt. Raises AnswerError (429) where the key has not so many tokens left, RequestError for more
        than it ever has."""
        for name, window in self._tokens.items():
            if num_tokens > window.limit:
                allowed = f"{window.limit}, this key's {name}"
                raise RequestError(None, f"has a prompt of {num_tokens} tokens", allowed=allowed)
            if (wait_s := window.wait_s(now_s, num_tokens)) > 0:
                raise _used_up(name, window.limit, wait_s)
        for window in self._tokens.values():
            window.add(now_s, num_tokens)

    def leave(self, now_s: float, num_tokens: int) -> None:
        """Counts a request out, whose answer has `num_tokens` tokens."""
        self._running -= 1
        for window in self._tokens.values():
            window.add(now_s, num_tokens)


class Quotas:
    """Those of all keys, by name."""

    def __init__(self, keys: tuple[ApiKey, ...], clock: Callable[[], float]):
        self._quotas, self._clock = {key.name: Quota(key) for key in keys}, clock

    @contextmanager
    def using(self, key: ApiKey | None, num_answer_tokens: Callable[[], int]) -> Iterator[Callable[[int], None]]:
        """A request of `key`, whose answer has `num_answer_tokens()` when it ends; call what this gives with the tokens
        of its prompts, once known. Raises AnswerError as `Quota.enter`, that call as `Quota.take`."""
        if key is None:
            yield lambda num_tokens: None
            return
        quota = self._quotas[key.name]
        quota.enter(self._clock())
        try:
            yield lambda num_tokens: quota.take(self._clock(), num_tokens)
        finally:
            quota.leave(self._clock(), num_answer_tokens())


def _windows(*limits: tuple[str, int | None, float]) -> dict[str, Window]:
    return {name: Window(limit, span_s) for name, limit, span_s in limits if limit is not None}


def _used_up(name: str, limit: int, wait_s: float) -> AnswerError:
    body = error_body(
        f"this key has used its {name} ({limit})", kind="rate_limit_error", code="rate_limit_exceeded", param=None
    )
    return AnswerError(429, body, {"Retry-After": str(max(1, math.ceil(wait_s)))})
