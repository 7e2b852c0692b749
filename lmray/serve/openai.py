"""OpenAI's chat completions on the wire: what is read, what is sent.

A field that would change the answer and is not supported is refused, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lmray.errors import DataError, did_you_mean

_NO_EFFECT = frozenset(
    ("metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user")
)
"""Fields that label a request or steer a provider's own service."""
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "n": (1,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "top_logprobs": (0,),
}
"""Fields that are accepted with the value that changes nothing."""


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class TextPart(_Wire):
    type: Literal["text"]
    text: str


class Function(_Wire):
    """A function that a model may call."""

    name: Annotated[str, Field(min_length=1)]
    description: str = ""
    parameters: dict[str, Any] = {}
    strict: Literal[False] | None = None
    """Arguments held to the schema need guided decoding."""


class Tool(_Wire):
    type: Literal["function"]
    function: Function

    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        return self.model_dump(exclude_unset=True, exclude={"function": {"strict"}})


class Called(_Wire):
    """A function that was called, its arguments as JSON."""

    name: str
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _is_object(cls, text: str) -> str:
        if not isinstance(json.loads(text), dict):  # what is no JSON raises a ValueError too
            raise ValueError("are no JSON object")
        return text


class ToolCall(_Wire):
    id: str
    type: Literal["function"] = "function"
    function: Called

    def plain(self) -> dict[str, Any]:
        """As chat templates take it: the arguments as an object."""
        function = {"name": self.function.name, "arguments": json.loads(self.function.arguments)}
        return {"id": self.id, "type": self.type, "function": function}


class ChatMessage(_Wire):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls are the assistant's, not of role `{self.role}`")
        if self.tool_call_id and self.role != "tool":
            raise ValueError(f"tool_call_id belongs to role `tool`, not `{self.role}`")
        return self

    def plain(self) -> dict[str, Any]:
        """The message as chat templates take it: content as one string."""
        parts = self.content or ""
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        calls = {"tool_calls": [call.plain() for call in self.tool_calls]} if self.tool_calls else {}
        answered = {"tool_call_id": self.tool_call_id} if self.tool_call_id else {}
        return {"role": self.role, "content": text} | calls | answered


class StreamOptions(_Wire):
    include_usage: bool = False


class ChatRequest(_Wire):
    """The body of `POST /v1/chat/completions`."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: (
        Annotated[str, Field(min_length=1)] | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4)]
    ) = []
    seed: int | None = None
    tools: list[Tool] = []
    tool_choice: Literal["none", "auto"] = "auto"
    """Whether the model is told of `tools`. It cannot be made to call one without guided decoding."""
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        """What the chat template is given; None where the model is to call nothing."""
        return [tool.plain() for tool in self.tools] if self.tools and self.tool_choice == "auto" else None


class RequestError(DataError):
    """A request that OpenAI's protocol or this server does not allow; `param` is the field."""

    def __init__(self, param: str | None, found: str, *, allowed: str | None = None, hint: str | None = None):
        super().__init__(param or "request", found, allowed=allowed, hint=hint)
        self.param = param


def read_chat_request(body: Any) -> ChatRequest:
    """`body` (decoded JSON) as a request. Raises RequestError naming the field."""
    if not isinstance(body, dict):
        raise RequestError(None, "the body is not a JSON object")
    fields = {}
    for key, value in body.items():
        if value is None or key in _NO_EFFECT:
            continue
        if key in _NEUTRAL:
            if value not in _NEUTRAL[key]:
                allowed = f"{_NEUTRAL[key][0]!r}, or leave it out"
                raise RequestError(key, f"{value!r} is not supported", allowed=allowed)
        elif key not in ChatRequest.model_fields:
            known = sorted({*ChatRequest.model_fields, *_NEUTRAL, *_NO_EFFECT})
            raise RequestError(key, "unknown field", allowed=", ".join(known), hint=did_you_mean(key, known))
        else:
            fields[key] = value
    try:
        request = ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise _request_error(error) from None
    if None not in (request.max_tokens, request.max_completion_tokens):
        raise RequestError("max_tokens", "means the same as `max_completion_tokens`", hint="give one")
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options", "is given without `stream`", hint='add `"stream": true`')
    return request


def _request_error(error: ValidationError) -> RequestError:
    """The problem that says most: where a field may be a text or a list, the one about what was given."""

    def depth(problem: Any) -> tuple[bool, int]:
        return problem["type"] not in ("string_type", "list_type"), len(problem["loc"])

    worst = max(error.errors(include_url=False), key=depth)
    branches = ("str", "constrained-str")  # and `list[...]`: which of a field's types was tried
    path = [str(part) for part in worst["loc"] if part not in branches and not str(part).startswith("list[")]
    return RequestError(".".join(path), worst["msg"])


def completion(
    head: Mapping[str, Any],
    text: str,
    finish_reason: str,
    usage: Mapping[str, int],
    *,
    calls: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The whole answer of a request without `stream`. `head` holds `id`, `created`, `model`."""
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if calls:
        message |= {"content": text.strip() or None, "tool_calls": [*calls]}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
    return {**head, "object": "chat.completion", "choices": [choice], "usage": dict(usage)}


def chunk(head: Mapping[str, Any], delta: Mapping[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    """One piece of a streamed answer."""
    choice = {"index": 0, "delta": dict(delta), "logprobs": None, "finish_reason": finish_reason}
    return {**head, "object": "chat.completion.chunk", "choices": [choice]}


def usage_chunk(head: Mapping[str, Any], usage: Mapping[str, int]) -> dict[str, Any]:
    """The last piece of a stream that asked for `include_usage`."""
    return {**head, "object": "chat.completion.chunk", "choices": [], "usage": dict(usage)}


def token_usage(num_prompt_tokens: int, num_answer_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_answer_tokens,
        "total_tokens": num_prompt_tokens + num_answer_tokens,
    }


def error_body(message: str, *, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients expect it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def model_list(names: Mapping[str, str | None], created: int) -> dict[str, Any]:
    """The answer of `GET /v1/models`; `names` maps a model's name to its adapter, None for the base model."""
    base = next(name for name, adapter in names.items() if adapter is None)
    data = [
        {"id": name, "object": "model", "created": created, "owned_by": "lmray", "parent": base if adapter else None}
        for name, adapter in names.items()
    ]
    return {"object": "list", "data": data}
