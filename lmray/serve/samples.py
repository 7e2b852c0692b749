"""Replicas of whose answers some are scored while nobody waits, and dropped then, unless they are to be kept.

Stands between the gateway's `Fleet` and the replicas, where a request names the version that answers it. Measures of an
answer: `length` in tokens, of those that the model or the limit ended; `refusal`, 0 or 1; `log_perplexity`, the mean
negative log probability of its tokens under the base model, in nats.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
import traceback
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lmray.artifacts.store import Store
from lmray.config.monitor import Monitor
from lmray.data.filters.base import TextFilter
from lmray.engines.base import Request, Sampling, TokenEvent
from lmray.errors import LmrayError, RemoteError
from lmray.serve.drift import Drift
from lmray.serve.filters import FilteredText, filtered_call, of_answers
from lmray.serve.fleet import Replicas
from lmray.serve.refusals import Refusals
from lmray.serve.tool_forms import read_whole
from lmray.serve.tools_tagged import CLOSE, OPEN

MAX_PENDING = 32
"""Answers that wait to be scored; beyond them the oldest is dropped."""
MAX_CONTEXT_TOKENS, MAX_ANSWER_TOKENS = 256, 256
"""Of a prompt's end and of an answer's start, that the base model reads for one score."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One answer."""

    version: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    is_whole: bool
    """Not cut by a stop string of the client's."""


class Scorer:
    """From an answer to numbers."""

    def __init__(self, replicas: Replicas, tokenizer: PreTrainedTokenizerBase, settings: Monitor):
        self._replicas, self._tokenizer = replicas, tokenizer
        self._refusals = Refusals(settings.refusals)
        self._reads = settings.perplexity

    async def score(self, sample: Sample) -> dict[str, float]:
        """Its measures. Raises LmrayError where the base model cannot be asked."""
        scores = {"length": float(len(sample.answer_ids))} if sample.is_whole else {}
        scores["refusal"] = float(self._refusals.match(self.text(sample.answer_ids)))
        if self._reads:
            scores["log_perplexity"] = await self._log_perplexity(sample)
        return scores

    def text(self, ids: tuple[int, ...], *, special: bool = False) -> str:
        options = {"skip_special_tokens": not special, "clean_up_tokenization_spaces": False}
        return str(self._tokenizer.decode(list(ids), **options))

    async def _log_perplexity(self, sample: Sample) -> float:
        context, answer = sample.prompt_ids[-MAX_CONTEXT_TOKENS:], sample.answer_ids[:MAX_ANSWER_TOKENS]
        name = f"monitor-{uuid.uuid4().hex}"  # also for a salt: it takes no part in the cache that others share
        request = Request(name, (*context, *answer), Sampling(max_tokens=0, prompt_logprobs=0), cache_salt=name)
        async with aclosing(self._replicas.stream(request)) as events:
            told = [event.prompt_logprobs async for event in events if event.prompt_logprobs is not None]
        if not told:
            hint = "set `monitor.perplexity: false`"
            raise RemoteError("engine", "tells no log probabilities of prompts", hint=hint)
        return -sum(one.logprob for one in told[0][len(context) :] if one is not None) / len(answer)


class KeptAnswers:
    """At most `limit` answers with their prompts in the store; the oldest give way."""

    def __init__(self, store: Store, endpoint: str, limit: int, filters: Sequence[TextFilter] = ()):
        """`filters`: of answers; what they take out is not kept either."""
        self._store, self._folder, self._limit = store, f"endpoints/{endpoint}/samples", limit
        self._filters = of_answers(filters)
        self._place: int | None = None

    def keep(self, facts: dict[str, Any]) -> None:
        """Raises OSError."""
        if self._place is None:
            self._place = self._oldest()
        content = (json.dumps({**facts, "answer": self._passed(facts["answer"])}, ensure_ascii=False) + "\n").encode()
        self._store.put(self._key(self._place), content)
        self._place = (self._place + 1) % self._limit

    def _passed(self, answer: str) -> str:
        """What the filters let through, of calls as they read."""
        if not self._filters:
            return answer
        way, (text, calls) = FilteredText(self._filters), read_whole(answer)
        text, _ = way.push(text, last=True)
        passed = () if way.stopped else [one for call in calls if (one := filtered_call(call, self._filters)[0])]
        return text + "".join(f"{OPEN}{json.dumps(one['function'], ensure_ascii=False)}{CLOSE}" for one in passed)

    def _oldest(self) -> int:
        """The first place that is free, or else was written longest ago."""
        stamps = [self._store.stamp(self._key(place)) or () for place in range(self._limit)]
        return min(range(self._limit), key=stamps.__getitem__)

    def _key(self, place: int) -> str:
        return f"{self._folder}/{place:06d}.json"


class SampledReplicas:
    """`replicas`, and what is seen of their answers goes to `drift`."""

    def __init__(
        self,
        replicas: Replicas,
        drift: Drift,
        scorer: Scorer,
        *,
        base: str,
        fraction: float,
        kept: KeptAnswers | None = None,
        draw: random.Random | None = None,
    ):
        """`base`: what answers of the base model go by; `draw`: which answers are sampled."""
        self._replicas, self._drift, self._scorer, self._kept = replicas, drift, scorer, kept
        self._base, self._fraction, self._draw = base, fraction, draw or random.Random()
        self._pending: deque[Sample] = deque()
        self._num_waiting = 0
        self._scoring: asyncio.Task[None] | None = None

    async def stream(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        sampled = request.sampling.max_tokens > 0 and self._draw.random() < self._fraction
        answer_ids: list[int] = []
        started = is_whole = False
        self._num_waiting += 1
        try:
            async with aclosing(self._replicas.stream(request)) as events:
                async for event in events:
                    if not started:
                        started = True
                        self._answered()
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
                version = request.adapter or self._base
                self._push(Sample(version, request.prompt_ids, tuple(answer_ids), is_whole))
            if not started:
                self._answered()

    async def everywhere(self, method: str, *arguments: Any) -> list[Any]:
        return await self._replicas.everywhere(method, *arguments)

    async def settle(self) -> None:
        """Returns once all that can be scored now is."""
        if self._scoring is not None:
            await asyncio.wait({self._scoring})

    def _answered(self) -> None:
        """One request less waits for its first token."""
        self._num_waiting -= 1
        self._go_on()

    def _push(self, sample: Sample) -> None:
        if len(self._pending) == MAX_PENDING:
            self._pending.popleft()
            self._drift.missed += 1
        self._pending.append(sample)
        self._go_on()

    def _go_on(self) -> None:
        if self._pending and not self._num_waiting and (self._scoring is None or self._scoring.done()):
            self._scoring = asyncio.get_running_loop().create_task(self._score())

    async def _score(self) -> None:
        """Scores one answer after the other until a request waits."""
        while self._pending and not self._num_waiting:
            sample = self._pending.popleft()
            try:
                scores = await self._scorer.score(sample)
                await self._drift.add(sample.version, scores)
                if self._kept is not None:
                    await asyncio.to_thread(self._kept.keep, self._facts(sample, scores))
            except Exception as error:  # whatever one answer runs into, the watch goes on
                self._drift.missed += 1
                _LOG.warning("an answer of `%s` is not scored: %s", sample.version, _told(error))

    def _facts(self, sample: Sample, scores: dict[str, float]) -> dict[str, Any]:
        prompt = self._scorer.text(sample.prompt_ids, special=True)
        facts = {"version": sample.version, "prompt": prompt, "answer": self._scorer.text(sample.answer_ids)}
        return {**facts, "scores": scores, "time": round(time.time(), 3)}


def _told(error: Exception) -> str:
    """What is logged of `error`; of one that is not ours no message, which may quote the answer."""
    if isinstance(error, LmrayError | OSError):
        return str(error)
    return f"{type(error).__name__}\n" + "".join(traceback.format_tb(error.__traceback__))
