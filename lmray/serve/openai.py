"""OpenAI's completions on the wire: what is asked, and what is wrong with it.

A field that would change the answer and is not supported is refused, never ignored. Those in `_NO_EFFECT` label a
request or steer a provider's own service; they are read over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationError, field_validator

from lmray.engines.base import MIN_TEMPERATURE, REPETITION_PENALTIES, Sampling
from lmray.errors import did_you_mean
from lmray.serve.failures import RequestError
from lmray.serve.guided import ResponseFormat, grammar_of
from lmray.serve.messages import ChatMessage, Tool, Wire

MAX_CHOICES = 128
"""Answers to one request, over all its prompts."""
MAX_LOGPROBS = 20
MAX_BIASES = 300
"""Tokens of one request whose logits are changed, as at OpenAI."""
_NO_EFFECT = frozenset(
    ("metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user")
)
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {"best_of": (1,), "suffix": ("",)}
"""Fields that are accepted with the value that changes nothing."""


def _warm_or_greedy(temperature: float) -> float:
    if 0.0 < temperature < MIN_TEMPERATURE:
        raise ValueError(f"must be 0, or {MIN_TEMPERATURE:g} or more")
    return temperature


Temperature = Annotated[float, Field(ge=0.0, le=2.0), AfterValidator(_warm_or_greedy)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
NumTokens = Annotated[int, Field(ge=1)]
StopString = Annotated[str, Field(min_length=1)]
Prompt = str | tuple[int, ...]
"""A text, or its tokens."""
R = TypeVar("R", bound="GenerationRequest")


class StreamOptions(Wire):
    include_usage: bool = False


class GenerationRequest(Wire):
    """What all requests for answers share."""

    model: str
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    temperature: Temperature = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    seed: int | None = None
    """Of the first answer to a prompt; the next ones count on from it."""
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(ge=REPETITION_PENALTIES[0], le=REPETITION_PENALTIES[1])] = 1.0
    logit_bias: dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100.0, le=100.0)]] = Field(
        default_factory=dict, max_length=MAX_BIASES
    )
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] = Field(default_factory=list)
    response_format: ResponseFormat = ResponseFormat()
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, room: int, place: int) -> Sampling:
        """For answer `place` to one prompt that leaves `room` tokens."""
        return Sampling(
            max_tokens=self.limit(room),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=None if self.seed is None else self.seed + place,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=tuple(sorted(self.logit_bias.items())),
            logprobs=self.num_logprobs,
            prompt_logprobs=self.num_prompt_logprobs,
            grammar=grammar_of(self.response_format),
        )

    def limit(self, room: int) -> int:
        """Most tokens of an answer, where `room` are left."""
        raise NotImplementedError

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives told with each token of the answer; None where no log probability is."""
        raise NotImplementedError

    @property
    def num_prompt_logprobs(self) -> int | None:
        return None

    def check(self) -> None:
        """Raises RequestError for fields that contradict each other."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options", "is given without `stream`", hint='add `"stream": true`')


class ChatRequest(GenerationRequest):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: NumTokens | None = None
    max_completion_tokens: NumTokens | None = None
    logprobs: bool = False
    top_logprobs: NumLogprobs = 0
    tools: list[Tool] = Field(default_factory=list)
    tool_choice: Literal["none", "auto"] = "auto"
    """Whether the model is told of `tools`. It is not made to call one."""

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        """What the chat template is given; None where the model is to call nothing."""
        return [tool.plain() for tool in self.tools] if self.tools and self.tool_choice == "auto" else None

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    def limit(self, room: int) -> int:
        return self.max_tokens or self.max_completion_tokens or room

    def check(self) -> None:
        super().check()
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise RequestError("max_tokens", "means the same as `max_completion_tokens`", hint="give one")
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs", "is given without `logprobs`", hint='add `"logprobs": true`')
        if self.offered_tools and self.response_format.type != "text":
            hint = 'set `"tool_choice": "none"`'
            raise RequestError("response_format", "leaves no room for a call of `tools`", hint=hint)


class CompletionRequest(GenerationRequest):
    """The body of `POST /v1/completions`."""

    prompt: tuple[Prompt, ...]
    max_tokens: Annotated[int, Field(ge=0)] = 16
    """0: only the prompt is read."""
    logprobs: NumLogprobs | None = None
    prompt_logprobs: NumLogprobs | None = None
    echo: bool = False
    """Whether the prompt stands before its answer, and its log probabilities before the answer's."""

    @field_validator("prompt", mode="plain")
    @classmethod
    def _one_or_many(cls, given: Any) -> tuple[Prompt, ...]:
        prompts = [given] if isinstance(given, str) or _is_tokens(given) else given
        if not isinstance(prompts, list) or not all(isinstance(one, str) or _is_tokens(one) for one in prompts):
            raise ValueError("is neither a text nor a list of token ids, and no list of these")
        if not prompts or not all(prompts):
            raise ValueError("is empty")
        return tuple(one if isinstance(one, str) else tuple(one) for one in prompts)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        echoed = self.logprobs if self.echo else None
        asked = [num for num in (echoed, self.prompt_logprobs) if num is not None]
        return max(asked, default=None)

    def limit(self, room: int) -> int:
        return self.max_tokens

    def check(self) -> None:
        super().check()
        if self.stream and self.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs", "are not streamed", hint="leave `stream` out, or use `echo`")
        if self.n * len(self.prompt) > MAX_CHOICES:
            found = f"{len(self.prompt)} prompts with {self.n} answers each"
            raise RequestError("prompt", found, allowed=f"{MAX_CHOICES} answers")


def _is_tokens(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(type(token) is int for token in given)


def read_request(kind: type[R], body: Any) -> R:
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
        elif key not in kind.model_fields:
            known = sorted({*kind.model_fields, *_NEUTRAL, *_NO_EFFECT})
            raise RequestError(key, "unknown field", allowed=", ".join(known), hint=did_you_mean(key, known))
        else:
            fields[key] = value
    try:
        request = kind.model_validate_json(
            json.dumps(fields)
        )  # as JSON: there an object may be a part and a list a tuple
    except ValidationError as error:
        raise _request_error(error) from None
    request.check()
    return request


def _request_error(error: ValidationError) -> RequestError:
    """The problem that says most: where a field may be a text or a list, the one about what was given."""

    def depth(problem: Any) -> tuple[bool, int]:
        return problem["type"] not in ("string_type", "list_type"), len(problem["loc"])

    worst = max(error.errors(include_url=False), key=depth)
    branches = ("str", "constrained-str", "[key]")  # and `list[...]`: which of a field's types was tried
    path = [str(part) for part in worst["loc"] if part not in branches and not str(part).startswith("list[")]
    return RequestError(".".join(path), worst["msg"])
