"""One answer: its engine's tokens become text, log probabilities and tool calls while they come."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from lmray.config.endpoint import TextFilter
from lmray.engines.base import Request, TokenEvent, TokenLogprob
from lmray.serve.filters import FilteredText
from lmray.serve.text import Detokeniser, StopStrings
from lmray.serve.tokens import Told
from lmray.serve.tools import ToolCalls


class Backend(Protocol):
    """Where tokens come from: an engine in this process, or replicas somewhere."""

    def stream(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """The tokens that continue `request`. Closing it early cancels the request. Raises LmrayError."""
        ...

    async def adapters(self) -> tuple[str, ...]:
        """Handles of the adapters that requests may name. Raises LmrayError while nothing can be served."""
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
    filtered: tuple[str, ...] = ()
    """Names of filters that found something, once a match."""


class Answer:
    """The text of one answer, and what goes with it, while its tokens come."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stops: tuple[str, ...] = (),
        *,
        calls: ToolCalls | None = None,
        echo: Question | None = None,
        filters: Sequence[TextFilter] = (),
    ):
        """`calls`: takes tool calls out of the text. `echo`: the answer starts with this prompt, which `filters` do not
        see."""
        self._tokenizer = tokenizer
        self._text = self._detokeniser(special=False)
        self._stops = StopStrings(stops)
        self._filters = FilteredText(filters)
        self._calls = calls
        self._echo = echo
        self._offset = len(echo.text) if echo is not None else 0

    def push(self, event: TokenEvent) -> Piece:
        """What `event` adds; without text while that may be the start of a tool call. An answer with calls that the
        model ended itself has `tool_calls` for a reason. Nothing may follow a piece with a `finish_reason`."""
        told = self._told(event)
        text, reason = self._said(event)
        text, found = self._filters.push(text, last=reason is not None)
        reason = "content_filter" if self._filters.stopped else reason
        calls: tuple[dict[str, Any], ...] = ()
        if self._calls is not None:
            text, calls = self._calls.push(text)
            reason = "tool_calls" if self._calls.done else reason
            if reason is not None:
                reason = "tool_calls" if self._calls.num_calls and reason == "stop" else reason
                text += self._calls.finish()
        if self._echo is not None:
            text, self._echo = self._echo.text + text, None
        return Piece(text, reason, calls, told, event.prompt_logprobs or (), found)

    def _said(self, event: TokenEvent) -> tuple[str, str | None]:
        """What `event` adds to the text as it stands, and why it ends. A stop string can be a reason too."""
        text = ""
        if event.token_id is not None:
            said = self._text.push(event.token_id)
            self._offset += len(said)
            text = self._stops.push(said)
        if event.finish_reason is not None:
            text += self._stops.push(self._text.finish())
        if self._stops.stopped:
            return text, "stop"
        if event.finish_reason is not None:
            return text + self._stops.finish(), event.finish_reason
        return text, None

    def _told(self, event: TokenEvent) -> tuple[Told, ...]:
        """Log probabilities of `event`'s token, behind those of an echoed prompt."""
        own = () if event.logprob is None else (Told(event.logprob.token_id, self._offset, event.logprob),)
        if self._echo is None or event.prompt_logprobs is None:
            return own
        reading, offset, before = self._detokeniser(special=True), 0, []
        for token_id, logprob in zip(self._echo.ids, event.prompt_logprobs, strict=True):
            before.append((token_id, offset, logprob))
            offset += len(reading.push(token_id))
        added = offset + len(reading.finish()) - len(self._echo.text)  # special tokens put before a text that was given
        return (*(Told(token_id, max(0, place - added), logprob) for token_id, place, logprob in before), *own)

    def _detokeniser(self, *, special: bool) -> Detokeniser:
        options = {"skip_special_tokens": not special, "clean_up_tokenization_spaces": False}
        return Detokeniser(lambda ids: str(self._tokenizer.decode(ids, **options)))
