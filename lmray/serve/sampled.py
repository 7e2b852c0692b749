"""Replicas of whose answers some are scored while nobody waits, and dropped then, unless they are to be kept.

Stands between the gateway's `Fleet` and the replicas, where a request names the version that answers it, or a replica
tells with its answer which one it serves.
"""

from __future__ import annotations

import asyncio
import logging
import random
import traceback
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from lmray.engines.base import Request, TokenEvent
from lmray.errors import LmrayError
from lmray.serve.drift import Drift
from lmray.serve.fleet import Replicas
from lmray.serve.samples import KeptAnswers, Sample, Scorer

MAX_PENDING = 32
"""Answers that wait to be scored; beyond them the oldest is dropped."""
_LOG = logging.getLogger(__name__)


class Scoring:
    """Scores the sampled answers of an endpoint one after the other, while no request waits for its first token."""

    def __init__(self, drift: Drift, scorer: Scorer, *, kept: KeptAnswers | None = None):
        self._drift, self._scorer, self._kept = drift, scorer, kept
        self._pending: deque[Sample] = deque()
        self._num_waiting = 0
        self._task: asyncio.Task[None] | None = None

    def waits(self) -> None:
        """One request more waits for its first token."""
        self._num_waiting += 1

    def answered(self) -> None:
        """One less."""
        self._num_waiting -= 1
        self._go_on()

    def push(self, sample: Sample) -> None:
        if len(self._pending) == MAX_PENDING:
            self._pending.popleft()
            self._drift.missed += 1
        self._pending.append(sample)
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
            sample = self._pending.popleft()
            try:
                scores = await self._scorer.score(sample)
                await self._drift.add(sample.version, scores)
                if self._kept is not None:
                    await asyncio.to_thread(self._kept.keep, self._scorer.facts(sample, scores))
            except Exception as error:  # whatever one answer runs into, the watch goes on
                self._drift.missed += 1
                _LOG.warning("an answer of `%s` is not scored: %s", sample.version, _told(error))


class SampledReplicas:
    """`replicas`, and what is seen of a share of their answers goes to `scoring`."""

    def __init__(
        self,
        replicas: Replicas,
        scoring: Scoring,
        *,
        name: str | None,
        fraction: float,
        draw: random.Random | None = None,
    ):
        """`name`: what answers without an adapter go by; None: by the version that the replica tells with them. `draw`:
        which answers are sampled."""
        self._replicas, self._scoring, self._name = replicas, scoring, name
        self._fraction, self._draw = fraction, draw or random.Random()

    async def stream(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        sampled = request.sampling.max_tokens > 0 and self._draw.random() < self._fraction
        answer_ids: list[int] = []
        version = request.adapter or self._name
        started = is_whole = False
        self._scoring.waits()
        try:
            async with aclosing(self._replicas.stream(request)) as events:
                async for event in events:
                    if not started:
                        started, version = True, version or event.version
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
            if answer_ids and version is not None:
                self._scoring.push(Sample(version, request.prompt_ids, tuple(answer_ids), is_whole))
            if not started:
                self._scoring.answered()

    async def everywhere(self, method: str, *arguments: Any) -> list[Any]:
        return await self._replicas.everywhere(method, *arguments)


def _told(error: Exception) -> str:
    """What is logged of `error`; of one that is not ours no message, which may quote the answer."""
    if isinstance(error, LmrayError | OSError):
        return str(error)
    return f"{type(error).__name__}\n" + "".join(traceback.format_tb(error.__traceback__))
