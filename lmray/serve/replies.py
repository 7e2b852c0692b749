"""OpenAI's answers on the wire, as the OpenAPI document tells them. A field with a default may be missing."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Reason = Literal["stop", "length", "tool_calls", "content_filter"]
Count = Annotated[int, Field(ge=0)]
Bytes = list[Annotated[int, Field(ge=0, le=255)]]


class Reply(BaseModel):
    """A part of an answer. Nothing else is sent."""

    model_config = ConfigDict(extra="forbid")


class Usage(Reply):
    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count


class Error(Reply):
    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    """The field of the request."""
    code: str | None


class ErrorReply(Reply):
    error: Error


class ModelCard(Reply):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None
    """Of an adapter: the base model."""


class ModelList(Reply):
    object: Literal["list"]
    data: list[ModelCard]


class CalledFunction(Reply):
    name: str
    arguments: str
    """A JSON object as text."""


class Call(Reply):
    id: str
    type: Literal["function"]
    function: CalledFunction


class Message(Reply):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[Call] = []


class Likely(Reply):
    token: str
    logprob: float
    bytes: Bytes


class ToldToken(Likely):
    top_logprobs: list[Likely]


class ChatLogprobs(Reply):
    content: list[ToldToken]
    refusal: None


class ChatChoice(Reply):
    index: Count
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: Reason


class ChatReply(Reply):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(Reply):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[Count]


class CompletionChoice(Reply):
    index: Count
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Reason
    prompt_logprobs: list[dict[str, Any] | None] = []
    """Where the request asks for them."""


class CompletionReply(Reply):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Alive(Reply):
    status: Literal["alive"]


class Ready(Reply):
    status: Literal["ready"]
    models: list[str] = []
    """Told where no key is asked for."""
