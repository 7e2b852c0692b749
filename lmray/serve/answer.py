"""One chat turn: from a request in words to tokens for the engine, and from its tokens back to words."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lmray.data.tokenise import prompt_ids
from lmray.engines.base import Request, Sampling, TokenEvent
from lmray.serve.openai import ChatRequest, RequestError
from lmray.serve.text import Detokeniser, StopStrings


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


def make_request(
    chat: ChatRequest, adapter: str | None, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Request:
    """`chat` as tokens. Raises RequestError for messages that the template refuses or that leave no room to answer."""
    try:
        ids = prompt_ids(tokenizer, [message.plain() for message in chat.messages])
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


class Answer:
    """The text of one answer while its tokens come."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: tuple[str, ...]):
        self.num_tokens = 0
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        self._text = Detokeniser(lambda ids: str(tokenizer.decode(ids, **options)))
        self._stops = StopStrings(stops)

    def push(self, event: TokenEvent) -> Piece:
        """What `event` adds. Nothing may follow a piece with a `finish_reason`, which a stop string can bring too."""
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
