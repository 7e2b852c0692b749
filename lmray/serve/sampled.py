"""Replicas of whose answers some are scored while nobody waits, and dropped then, unless they are to be kept.

Stands between the gateway's `Fleet` and the replicas, where a request names the version that answers it, or where all
replicas serve one version, which they tell.
"""

from __future__ import annotations

import asyncio
import logging
import random
import traceback
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from lmray.engines.base import Request, TokenEvent
from lmray.errors import LmrayError, RemoteError
from lmray.serve.drift import Drift
from lmray.serve.fleet import Replicas
from lmray.serve.samples import KeptAnswers, Sample, Scorer

MAX_PENDING = 32
"""Answers that wait to be scored; beyond them the oldest is dropped."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Pending:
    sample: Sample
    label: str
    """What is said of it where it is not scored."""
    version: Callable[[], Awaitable[str]]
    """Tells what answered; raises LmrayError where that is not known."""


class Scoring:
    """Scores the sampled answers of an endpoint one after the other, while no request waits for its first token."""

    def __init__(self, drift: Drift, scorer: Scorer, *, kept: KeptAnswers | None = None):
        self._drift, self._scorer, self._kept = drift, scorer, kept
        self._pending: deque[_Pending] = deque()
        self._num_waiting = 0
        self._task: asyncio.Task[None] | None = None

    def waits(self) -> None:
        """One request more waits for its first token."""
        self._num_waiting += 1

    def answered(self) -> None:
        """One less."""
        self._num_waiting -= 1
        self._go_on()

    def push(self, sample: Sample, label: str, version: Callable[[], Awaitable[str]]) -> None:
        """Scores `sample` for the `version` that is told then; in the log it goes by `label`."""
        if len(self._pending) == MAX_PENDING:
            self._pending.popleft()
            self._drift.missed += 1
        self._pending.append(_Pending(sample, label, version))
        self._go_on()

    async def settle(self) -> None:
        """Returns once all that can be scored now is."""
        if self._task is not None:
            await asyncio.wait({self._task})

    def _go_on(self) -> None:
        if self._pending and not self._num_waiting and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._score())

    async def _score(self) -> None:
        """Until a request waits."""
        while self._pending and not self._num_waiting:
            pending = self._pending.popleft()
            try:
                version = await pending.version()
                scores = await self._scorer.score(pending.sample)
                await self._drift.add(version, scores)
                if self._kept is not None:
                    facts = {"version": version, **self._scorer.facts(pending.sample, scores)}
                    await asyncio.to_thread(self._kept.keep, facts)
            except Exception as error:  # whatever one answer runs into, the watch goes on
                self._drift.missed += 1
                _LOG.warning("an answer of `%s` is not scored: %s", pending.label, _told(error))


class SampledReplicas:
    """`replicas`, and what is seen of a share of their answers goes to `scoring`."""

    def __init__(
        self,
        replicas: Replicas,
        scoring: Scoring,
        *,
        name: str,
        fraction: float,
        is_merged: bool = False,
        draw: random.Random | None = None,
    ):
        """`name`: what answers without an adapter go by, `NAME@VERSION`; `is_merged`: NAME alone, and the replicas tell
        the version, which changes with a promotion. `draw`: which answers are sampled."""
        self._replicas, self._scoring, self._name, self._is_merged = replicas, scoring, name, is_merged
        self._fraction, self._draw = fraction, draw or random.Random()

    async def stream(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        sampled = request.sampling.max_tokens > 0 and self._draw.random() < self._fraction
        answer_ids: list[int] = []
        started = is_whole = False
        self._scoring.waits()
        try:
            async with aclosing(self._replicas.stream(request)) as events:
                async for event in events:
                    if not started:
                        started = True
                        self._scoring.answered()
                    if sampled and event.token_id is not None:
                        answer_ids.append(event.token_id)
                    is_whole = event.finish_reason is not None
                    yield event
        except GeneratorExit:  # a stop string ended it
            raise
        except BaseException:  # it failed, or the client left
            answer_ids.clear()
            raise
        finally:
            if answer_ids:
                sample = Sample(request.prompt_ids, tuple(answer_ids), is_whole)
                self._scoring.push(sample, request.adapter or self._name, partial(self._version, request.adapter))
            if not started:
                self._scoring.answered()

    async def everywhere(self, method: str, *arguments: Any) -> list[Any]:
        return await self._replicas.everywhere(method, *arguments)

    async def _version(self, adapter: str | None) -> str:
        """Of a merged model: what its replicas serve now, where that is one; an answer that a replica gave just before
        it was replaced may be taken for the next version's."""
        if not self._is_merged:
            return adapter or self._name
        told = {str(one["version"]) for one in await self._replicas.everywhere("stats")}
        if len(told) != 1:
            raise RemoteError(self._name, f"which of {len(told)} versions it came from is not known")
        return told.pop()


def _told(error: Exception) -> str:
    """What is logged of `error`; of one that is not ours no message, which may quote the answer."""
    if isinstance(error, LmrayError | OSError):
        return str(error)
    return f"{type(error).__name__}\n" + "".join(traceback.format_tb(error.__traceback__))
