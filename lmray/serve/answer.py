"""One chat turn: from a request in words to tokens for the engine, and from its tokens back to words."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lmray.data.pieces import Messages, Tools
from lmray.data.tokenise import prompt_ids
from lmray.engines.base import Request, Sampling, TokenEvent
from lmray.serve.openai import ChatRequest, RequestError
from lmray.serve.text import Detokeniser, StopStrings
from lmray.serve.tools import ToolCalls, writes_tool_calls


class Backend(Protocol):
    """Where tokens come from: an engine in this process, or replicas somewhere."""

    def stream(self, request: Request) -> AsyncIterator[TokenEvent]:
        """The tokens that continue `request`. Closing it early cancels the request. Raises LmrayError."""
        ...

    async def adapters(self) -> tuple[str, ...]:
        """Handles of the adapters that requests may name. Raises LmrayError while nothing can be served."""
        ...


@dataclass(frozen=True)
class Piece:
    """Text to send, maybe empty; the last piece carries `finish_reason`."""

    text: str
    finish_reason: str | None = None
    calls: tuple[dict[str, Any], ...] = ()
    """Tool calls that are whole now."""


def make_request(
    chat: ChatRequest, adapter: str | None, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Request:
    """`chat` as tokens. Raises RequestError for messages that the template refuses, tools that it does not show the
    model, and a conversation that leaves no room to answer."""
    messages, tools = [message.plain() for message in chat.messages], chat.offered_tools
    try:
        ids = prompt_ids(tokenizer, messages, tools)
        _check_shown(tokenizer, messages, tools, ids)
    except TemplateError as error:
        raise RequestError("messages", f"the model's chat template refuses them: {error}") from None
    room = max_length - len(ids)
    if room < 1:
        found = f"the messages are {len(ids)} tokens long"
        raise RequestError(
            "messages", found, allowed=f"at most {max_length - 1} tokens", hint="leave out earlier turns"
        )
    sampling = Sampling(
        max_tokens=chat.max_tokens or chat.max_completion_tokens or room,
        temperature=chat.temperature,
        top_p=chat.top_p,
        top_k=chat.top_k,
        seed=chat.seed,
    )
    return Request(f"chatcmpl-{uuid.uuid4().hex}", ids, sampling, adapter)


def _check_shown(tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools, ids: tuple[int, ...]) -> None:
    """Raises RequestError where the model would be asked the same without the tools, or without earlier calls."""
    if tools and prompt_ids(tokenizer, messages) == ids:
        hint = "leave them out, or serve a model that was trained to call functions"
        raise RequestError("tools", "the model's chat template has no place for them", hint=hint)
    silent = [{key: value for key, value in one.items() if key != "tool_calls"} for one in messages]
    if silent != messages and prompt_ids(tokenizer, silent, tools) == ids:
        raise RequestError("messages", "the model's chat template has no place for `tool_calls`")


def make_answer(chat: ChatRequest, tokenizer: PreTrainedTokenizerBase) -> Answer:
    """The answer to `chat`, before its first token. Its calls are read where the template asks for a form we know."""
    calls = chat.offered_tools is not None and writes_tool_calls(tokenizer.chat_template)
    return Answer(tokenizer, chat.stop_strings, calls=calls)


class Answer:
    """The text of one answer, and the tool calls in it, while its tokens come."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: tuple[str, ...], *, calls: bool = False):
        """`calls`: take tool calls out of the text."""
        self.num_tokens = 0
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        self._text = Detokeniser(lambda ids: str(tokenizer.decode(ids, **options)))
        self._stops = StopStrings(stops)
        self._calls = ToolCalls() if calls else None

    def push(self, event: TokenEvent) -> Piece:
        """What `event` adds; without text while that may be the start of a tool call. An answer with calls that the
        model ended itself has `tool_calls` for a reason. Nothing may follow a piece with a `finish_reason`."""
        piece = self._said(event)
        if self._calls is None:
            return piece
        text, calls = self._calls.push(piece.text)
        if piece.finish_reason is None:
            return Piece(text, None, calls)
        reason = "tool_calls" if self._calls.num_calls and piece.finish_reason == "stop" else piece.finish_reason
        return Piece(text + self._calls.finish(), reason, calls)

    def _said(self, event: TokenEvent) -> Piece:
        """What `event` adds to the text as it stands. A stop string can bring a `finish_reason` too."""
        text = ""
        if event.token_id is not None:
            self.num_tokens += 1
            text = self._stops.push(self._text.push(event.token_id))
        if event.finish_reason is not None:
            text += self._stops.push(self._text.finish())
        if self._stops.stopped:
            return Piece(text, "stop")
        if event.finish_reason is not None:
            return Piece(text + self._stops.finish(), event.finish_reason)
        return Piece(text)
