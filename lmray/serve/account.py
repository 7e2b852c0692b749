"""What one HTTP request was, took and cost: from its first byte to its last, however it ends."""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from lmray.data.filters.base import Found
from lmray.engines.base import TokenEvent
from lmray.serve.metrics import Metrics

ACCESS_LOG, FILTERS_LOG = "lmray.serve.access", "lmray.serve.filters"
"""Loggers of requests and of what filters found."""


@dataclass
class Account:
    """Written by whoever learns something; told to the metrics and the log once, at the end."""

    metrics: Metrics
    request_id: str
    path: str = ""
    """Of the route; empty for what is none."""
    key: str = ""
    """The key's name."""
    model: str = ""
    """Of the models that are served."""
    status: int = 0
    num_prompt_tokens: int = 0
    num_answer_tokens: int = 0
    started_s: float = field(default_factory=time.perf_counter)
    asked_s: float = 0.0
    leaving: AsyncExitStack = field(default_factory=AsyncExitStack)
    """What is closed when the request ends."""
    _found: defaultdict[tuple[str, str, str], Counter[str]] = field(
        default_factory=lambda: defaultdict(Counter), init=False
    )
    """Filter, where it looked and what it did -> what it found, how often."""
    _is_used: bool = field(default=False, init=False)
    """Whether it counted as a use of its model and key."""

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_answer_tokens

    @property
    def _labels(self) -> tuple[str, str]:
        """Of the model and the key, as they are now; both are known by the first count, which makes a use of them."""
        if not self._is_used:
            self._is_used = True
            self.metrics.use(self.model, self.key)
        return self.metrics.labels(self.model, self.key)

    def ask(self, num_prompt_tokens: int) -> None:
        """The engine is asked now; until `close` the request counts as running."""
        self.asked_s, self.num_prompt_tokens = time.perf_counter(), num_prompt_tokens
        model, _ = self._labels
        running = self.metrics.running.labels(model)  # the same one at the end, also where it was dropped meanwhile
        running.inc()
        self._between_tokens_s = self.metrics.between_tokens_s.labels(model)  # looked up once, not for every token
        self.leaving.callback(running.dec)

    def take(self, event: TokenEvent, before_s: float | None) -> float:
        """Counts an engine's event; `before_s` is what this call gave for the answer's event before. Returns now."""
        now_s = time.perf_counter()
        self.num_answer_tokens += event.token_id is not None
        if before_s is not None:
            self._between_tokens_s.observe(now_s - before_s if event.after_s is None else event.after_s)
            return now_s
        model, _ = self._labels
        self.metrics.first_token_s.labels(model).observe(now_s - self.asked_s)
        if event.prefill_s is not None:
            self.metrics.queue_s.labels(model).observe(max(0.0, now_s - self.asked_s - event.prefill_s))
        return now_s

    def find(self, on: str, found: Sequence[Found]) -> None:
        """Counts what filters found in `prompts` or `answers`."""
        for one in found:
            self.metrics.filtered.labels(one.label, on, one.kind, one.action).inc()
            self._found[one.label, on, one.action][one.kind] += 1

    def _tell_found(self) -> None:
        for (label, on, action), kinds in list(self._found.items()):  # a reader may still be at it
            told = " ".join(f"{kind}={num}" for kind, num in sorted(kinds.copy().items()))
            logging.getLogger(FILTERS_LOG).info(
                "request=%s filter=%s on=%s action=%s %s", self.request_id, label, on, action, told
            )

    async def close(self) -> None:
        """Closes what the request holds, counts it and logs one line, and one for each filter that found something;
        none has any of its text."""
        await self.leaving.aclose()
        self._tell_found()
        if not self.path:
            return
        model, key = self._labels
        self.metrics.requests.labels(self.path, model, key, str(self.status)).inc()
        self.metrics.prompt_tokens.labels(model, key).inc(self.num_prompt_tokens)
        self.metrics.answer_tokens.labels(model, key).inc(self.num_answer_tokens)
        logging.getLogger(ACCESS_LOG).info(
            "request=%s path=%s model=%s key=%s status=%d prompt_tokens=%d answer_tokens=%d seconds=%.3f",
            self.request_id,
            self.path,
            self.model or "-",
            self.key or "-",
            self.status,
            self.num_prompt_tokens,
            self.num_answer_tokens,
            time.perf_counter() - self.started_s,
        )
