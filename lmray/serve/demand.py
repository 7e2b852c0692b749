"""What one replica has to do and how it fares, in the numbers that `lmray.policies.autoscaling` decides by."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

RECENT = 32
"""Requests whose times count."""
RECENT_S = 30.0


class Demand:
    """Requests, prompts of theirs that wait to be read, and how long those read lately waited."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._waiting: dict[object, tuple[float, int]] = {}
        self._read: deque[tuple[float, float, float, int]] = deque(maxlen=RECENT)
        """When a first token came, how long it took, how much of that the replica was at this prompt, its tokens."""
        self._last = float("-inf")
        self._num_requests, self._request_s = 0, 0.0
        self._reported = self._counted = clock()

    @contextmanager
    def request(self, num_tokens: int) -> Iterator[Callable[[], None]]:
        """Counts a request while the block runs; call what it gives with each token, the first one ends its prompt's
        wait."""
        ticket, began = object(), self._clock()
        self._waiting[ticket] = began, num_tokens
        self._count(+1)

        def first_token() -> None:
            if self._waiting.pop(ticket, None) is not None:
                now = self._clock()
                self._read.append((now, now - began, now - max(began, self._last), num_tokens))
                self._last = now

        try:
            yield first_token
        finally:
            self._waiting.pop(ticket, None)
            self._count(-1)

    def report(self) -> dict[str, float]:
        """`requests` (mean number since the last report, so that short ones count too), `waiting_tokens`,
        `tokens_per_s` (while prompts are read), `tokens_per_request`, `first_token_s` (mean of late, or the longest
        wait that still goes on); 0 where nothing is known."""
        now = self._count(0)
        requests = self._request_s / (now - self._reported) if now > self._reported else float(self._num_requests)
        self._reported, self._request_s = now, 0.0
        recent = [entry for entry in self._read if now - entry[0] <= RECENT_S]
        tokens = sum(entry[3] for entry in self._read)
        busy_s = sum(entry[2] for entry in self._read)
        waits = [now - began for began, _ in self._waiting.values()]
        mean = sum(entry[1] for entry in recent) / len(recent) if recent else 0.0
        return {
            "requests": requests,
            "waiting_tokens": float(sum(num_tokens for _, num_tokens in self._waiting.values())),
            "tokens_per_s": tokens / busy_s if busy_s > 0 else 0.0,
            "tokens_per_request": tokens / len(self._read) if self._read else 0.0,
            "first_token_s": max([mean, *waits]),
        }

    def _count(self, change: int) -> float:
        """Notes that from now on there are `change` more requests, and gives the time."""
        now = self._clock()
        self._request_s += self._num_requests * (now - self._counted)
        self._counted, self._num_requests = now, self._num_requests + change
        return now
