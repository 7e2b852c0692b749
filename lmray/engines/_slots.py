"""Which request sits in which row of the batch: a state machine without a model.

Rows are dense: row i is `running[i]`. When a row ends, the last row moves into its place, so the batch never has holes
and the engine copies at most one row of its cache. Requests wait in the order they came.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from lmray.engines._sampling import Chooser
from lmray.engines.base import FinishReason, Request, TokenEvent, TokenLogprob


@dataclass(eq=False)
class Row:
    """One running request. Its cache holds `length` tokens; `last_token` is drawn but not yet read by the model."""

    request: Request
    max_length: int
    length: int = 0
    num_generated: int = 0
    last_token: int = -1
    chooser: Chooser = field(init=False)
    _started_s: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.chooser = Chooser(self.request)

    @property
    def tells_prompt(self) -> bool:
        """Whether the log probabilities of its prompt are still to be told, for which all its logits are needed."""
        return self.request.sampling.prompt_logprobs is not None and self.num_generated == 0

    def start(self) -> None:
        """From now on its prompt is read; the first call counts."""
        self._started_s = self._started_s or time.perf_counter()

    def prefill_s(self) -> float:
        assert self._started_s is not None
        return time.perf_counter() - self._started_s

    def take(self, token_id: int, stop_token_ids: frozenset[int], logprob: TokenLogprob | None = None) -> TokenEvent:
        """Records the token drawn for this row and says what is sent for it."""
        if token_id in stop_token_ids:
            return TokenEvent(self.request.id, None, "stop", logprob)
        self.last_token = token_id
        self.num_generated += 1
        return TokenEvent(self.request.id, token_id, self._finished(), logprob)

    def _finished(self) -> FinishReason | None:
        full = self.length + 1 >= self.max_length
        return "length" if full or self.num_generated >= self.request.sampling.max_tokens else None


@dataclass(frozen=True)
class Move:
    """Row `source` becomes row `target`."""

    source: int
    target: int


class Slots:
    """At most `max_rows` running requests, each at most `max_length` tokens long, and a queue."""

    def __init__(self, max_rows: int, max_length: int):
        self.max_rows, self.max_length = max_rows, max_length
        self.running: list[Row] = []
        self.waiting: deque[Request] = deque()

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    def adapters_in_use(self) -> set[str | None]:
        """Adapter handles of everything running or waiting."""
        return {row.request.adapter for row in self.running} | {request.adapter for request in self.waiting}

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def admit(self) -> Row | None:
        """The longest waiting request as a new last row, or None when none waits or no row is free."""
        if not self.waiting or len(self.running) >= self.max_rows:
            return None
        request = self.waiting.popleft()
        self.running.append(Row(request, self.max_length))
        self.running[-1].start()
        return self.running[-1]

    def release(self, index: int) -> Move | None:
        """Ends row `index`; says which row moved into its place, if one did."""
        last = self.running.pop()
        if index == len(self.running):
            return None
        self.running[index] = last
        return Move(source=len(self.running), target=index)

    def find(self, request_id: str) -> int | None:
        """The row of a running request."""
        return next((index for index, row in enumerate(self.running) if row.request.id == request_id), None)

    def drop_waiting(self, request_id: str) -> bool:
        """Takes a request out of the queue; says whether it was there."""
        kept = [request for request in self.waiting if request.id != request_id]
        dropped = len(kept) < len(self.waiting)
        self.waiting = deque(kept)
        return dropped

    def clear(self) -> list[str]:
        """Forgets everything; the ids of what was running or waiting."""
        ids = [row.request.id for row in self.running] + [request.id for request in self.waiting]
        self.running.clear()
        self.waiting.clear()
        return ids
