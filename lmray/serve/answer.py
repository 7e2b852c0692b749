"""One answer: its engine's tokens become text, log probabilities and tool calls while they come."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from lmray.data.detokenise import AnswerText, Detokeniser
from lmray.data.filters.base import Found, TextFilter
from lmray.engines.base import Request, TokenEvent, TokenLogprob
from lmray.serve.filters import FilteredText, filtered_call
from lmray.serve.tokens import Told
from lmray.serve.tools import CallReader


class Backend(Protocol):
    """Where tokens come from: an engine in this process, or replicas somewhere."""

    def stream(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """The tokens that continue `request`. Closing it early cancels the request. Raises LmrayError."""
        ...

    async def adapters(self) -> tuple[str, ...]:
        """Handles of the adapters that requests may name. Raises LmrayError while nothing can be served."""
        ...

    async def ready(self) -> None:
        """Raises LmrayError while no request would be answered."""
        ...

    async def stats(self) -> list[dict[str, Any]]:
        """What each engine tells of itself (`Engine.stats`). Raises LmrayError."""
        ...


@dataclass(frozen=True)
class Question:
    """One prompt as the engine reads it."""

    ids: tuple[int, ...]
    text: str
    """What an answer with `echo` starts with."""


@dataclass(frozen=True)
class Piece:
    """What one token adds to an answer, maybe no text; the last piece carries `finish_reason`."""

    text: str
    finish_reason: str | None = None
    calls: tuple[dict[str, Any], ...] = ()
    """Tool calls that are whole now."""
    told: tuple[Told, ...] = ()
    """Log probabilities of tokens, where they were asked for."""
    read: tuple[TokenLogprob | None, ...] = ()
    """Those of the prompt's tokens, with the first piece."""
    filtered: tuple[Found, ...] = ()
    """What filters found, once a match."""


class Answer:
    """The text of one answer, and what goes with it, while its tokens come."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stops: tuple[str, ...] = (),
        *,
        calls: CallReader | None = None,
        echo: Question | None = None,
        filters: Sequence[TextFilter] = (),
    ):
        """`calls`: takes tool calls out of the text. `echo`: the answer starts with this prompt, which `filters` do not
        see."""
        self._tokenizer = tokenizer
        self._said = AnswerText(self._decoding(special=False), stops)
        self._wanted, self._filters = tuple(filters), FilteredText(filters)
        self._calls = calls
        self._echo = echo
        self._start = len(echo.text) if echo is not None else 0

    def push(self, event: TokenEvent) -> Piece:
        """What `event` adds; without text while that may be the start of a tool call. An answer with calls that the
        model ended itself has `tool_calls` for a reason. Nothing may follow a piece with a `finish_reason`."""
        told = self._told(event)
        text, reason = self._said.push(event.token_id, event.finish_reason)
        calls: tuple[dict[str, Any], ...] = ()
        if self._calls is not None:
            text, calls = self._calls.push(text)
            reason = "tool_calls" if self._calls.done else reason
            if reason is not None:
                rest, last = self._calls.finish()
                text, calls = text + rest, calls + last
                reason = "tool_calls" if self._calls.num_calls and reason == "stop" else reason
        text, calls, reason, found = self._filtered(text, calls, reason)
        if self._echo is not None:
            text, self._echo = self._echo.text + text, None
        return Piece(text, reason, calls, told, event.prompt_logprobs or (), found)

    def _filtered(
        self, text: str, calls: tuple[dict[str, Any], ...], reason: str | None
    ) -> tuple[str, tuple[dict[str, Any], ...], str | None, tuple[Found, ...]]:
        """What the filters let through, and the reason where they end it: text and calls are filtered apart, for calls
        are written as JSON, in which a text may look like another."""
        if not self._wanted:
            return text, calls, reason, ()
        passed: list[dict[str, Any]] = []
        found: list[Found] = []
        for call in calls:
            one, matches = filtered_call(call, self._wanted)
            found += matches
            if one is None:
                reason = "content_filter"
                break
            passed.append(one)
        text, matches = self._filters.push(text, last=reason is not None)
        if self._filters.stopped:  # where the answer ended before these calls
            passed, reason = [], "content_filter"
        return text, tuple(passed), reason, (*found, *matches)

    def _told(self, event: TokenEvent) -> tuple[Told, ...]:
        """Log probabilities of `event`'s token, behind those of an echoed prompt."""
        place = self._start + self._said.num_chars
        own = () if event.logprob is None else (Told(event.logprob.token_id, place, event.logprob),)
        if self._echo is None or event.prompt_logprobs is None:
            return own
        reading, offset, before = Detokeniser(self._decoding(special=True)), 0, []
        for token_id, logprob in zip(self._echo.ids, event.prompt_logprobs, strict=True):
            before.append((token_id, offset, logprob))
            offset += len(reading.push(token_id))
        added = offset + len(reading.finish()) - len(self._echo.text)  # special tokens put before a text that was given
        return (*(Told(token_id, max(0, place - added), logprob) for token_id, place, logprob in before), *own)

    def _decoding(self, *, special: bool) -> Callable[[list[int]], str]:
        options = {"skip_special_tokens": not special, "clean_up_tokenization_spaces": False}
        return lambda ids: str(self._tokenizer.decode(ids, **options))
