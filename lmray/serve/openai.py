"""OpenAI's completions on the wire: what is asked, and what is wrong with it.

A field that would change the answer and is not supported is refused, never ignored. Those in `NO_EFFECT` label a
request or steer a provider's own service; they are read over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, PrivateAttr, ValidationError, field_validator

from lmray.config.endpoint import HttpLimits
from lmray.engines.base import MIN_TEMPERATURE, REPETITION_PENALTIES, Sampling
from lmray.errors import did_you_mean
from lmray.serve.failures import RequestError
from lmray.serve.guided import ResponseFormat, check_format, check_schema, grammar_of
from lmray.serve.messages import ChatMessage, Items, NamedTool, Tool, Wire
from lmray.serve.tool_forms import TAGGED
from lmray.serve.tools import CallForm

MAX_CHOICES = 128
"""Answers to one request, over all its prompts."""
MAX_LOGPROBS = 20
MAX_BIASES = 300
"""Tokens of one request whose logits are changed, as at OpenAI."""
MAX_NAME = 512
MAX_STOP_LENGTH = 1000
"""Characters."""
MAX_TOOLS = 128
MAX_PROBLEMS = 1000
"""Of one request, beyond which none is named."""
MAX_SEED = 2**63 - 1 - MAX_CHOICES
"""Seeds and those that count on from them are 64 bits wide."""
NO_EFFECT = frozenset(("metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"))
NEUTRAL: Mapping[str, tuple[Any, ...]] = {"best_of": (1,), "suffix": ("",), "modalities": (["text"],)}
"""Fields that are accepted with the value that changes nothing."""


def _warm_or_greedy(temperature: float) -> float:
    if 0.0 < temperature < MIN_TEMPERATURE:
        raise ValueError(f"must be 0, or {MIN_TEMPERATURE:g} or more")
    return temperature


Temperature = Annotated[float, Field(ge=0.0, le=2.0), AfterValidator(_warm_or_greedy)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
NumTokens = Annotated[int, Field(ge=1)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Prompt = str | tuple[int, ...]
"""A text, or its tokens."""
_Text = Annotated[str, Field(min_length=1)]
_Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
_Prompts = Annotated[list[_Text | _Tokens], Field(min_length=1)]
R = TypeVar("R", bound="GenerationRequest")
DEFAULT_LIMITS = HttpLimits()


class StreamOptions(Wire):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False
    """Nothing is added to pieces to hide how long they are."""


class GenerationRequest(Wire):
    """What all requests for answers share."""

    model: Annotated[str, Field(max_length=MAX_NAME)]
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    temperature: Temperature = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = 0
    """0, or -1 as other servers have it: all tokens."""
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    seed: Annotated[int, Field(ge=-(2**63), le=MAX_SEED)] | None = None
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
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            seed=None if self.seed is None else self.seed + place,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=tuple(sorted(self.logit_bias.items())),
            logprobs=self.num_logprobs,
            prompt_logprobs=self.num_prompt_logprobs,
            grammar=self.grammar,
        )

    @cached_property
    def grammar(self) -> str | None:
        """What answers are held to, as `llguidance` reads it; None for free text."""
        return grammar_of(self.response_format)

    @property
    def grammar_field(self) -> str:
        """Where `grammar` comes from."""
        return "response_format" + (".json_schema.schema" if self.response_format.json_schema is not None else "")

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
        check_format(self.response_format)
        if self.response_format.json_schema is not None:
            check_schema(self.response_format.json_schema.schema_, where="response_format.json_schema.schema")
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options", "is given without `stream`", hint='add `"stream": true`')


class ChatRequest(GenerationRequest):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[Items[ChatMessage], Field(min_length=1)]
    max_tokens: NumTokens | None = None
    max_completion_tokens: NumTokens | None = None
    logprobs: bool = False
    top_logprobs: NumLogprobs = 0
    tools: Items[Tool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    """Whether the model is told of `tools` (all but `none`), and made to call one, or this one."""
    parallel_tool_calls: bool = True
    """Whether an answer may call several."""
    _form: CallForm = PrivateAttr(TAGGED)

    def written_in(self, form: CallForm) -> None:
        """Calls are held to `form`; before `grammar` is asked for."""
        self._form = form

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        """What the chat template is given; None where the model is to call nothing."""
        return [tool.plain() for tool in self.tools] if self.tools and self.tool_choice != "none" else None

    @property
    def max_calls(self) -> int | None:
        """Calls after which an answer ends; None: with the model's own end."""
        return None if self.parallel_tool_calls and not isinstance(self.tool_choice, NamedTool) else 1

    @property
    def grammar_field(self) -> str:
        return "tools" if self.offered_tools else super().grammar_field

    @cached_property
    def grammar(self) -> str | None:
        """That of tool calls where one has to be made, or arguments have to be those of a strict function."""
        if not self.offered_tools:
            return super().grammar
        functions = [tool.function for tool in self.tools]
        if isinstance(self.tool_choice, NamedTool):
            named = self.tool_choice.function.name
            return self._form.grammar([one for one in functions if one.name == named], required=True, several=False)
        if self.tool_choice == "required":
            return self._form.grammar(functions, required=True, several=self.parallel_tool_calls)
        if any(function.strict for function in functions):
            return self._form.grammar(functions, required=False, several=self.parallel_tool_calls)
        return None

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    def limit(self, room: int) -> int:
        return min(room, self.max_tokens or self.max_completion_tokens or room)

    def check(self) -> None:
        super().check()
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise RequestError("max_tokens", "means the same as `max_completion_tokens`", hint="give one")
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs", "is given without `logprobs`", hint='add `"logprobs": true`')
        self._check_tools()
        if self.offered_tools and self.response_format.type != "text":
            hint = 'set `"tool_choice": "none"`'
            raise RequestError("response_format", "leaves no room for a call of `tools`", hint=hint)

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise RequestError("tools", "two functions have one name")
        for place, tool in enumerate(self.tools):
            check_schema(tool.function.parameters, where=f"tools.{place}.function.parameters")
        choice = self.tool_choice
        if choice == "required" and not names:
            raise RequestError("tool_choice", "is `required` without `tools`")
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            hint = did_you_mean(choice.function.name, names)
            allowed = ", ".join(names) or "none without `tools`"
            raise RequestError("tool_choice", "names a function that is not in `tools`", allowed=allowed, hint=hint)


class CompletionRequest(GenerationRequest):
    """The body of `POST /v1/completions`."""

    prompt: tuple[Prompt, ...]
    max_tokens: Annotated[int, Field(ge=0)] = 16
    """0: only the prompt is read."""
    logprobs: NumLogprobs | None = None
    prompt_logprobs: NumLogprobs | None = None
    echo: bool = False
    """Whether the prompt stands before its answer, and its log probabilities before the answer's."""

    @field_validator("prompt", mode="plain", json_schema_input_type=_Text | _Tokens | _Prompts)
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
        return min(room, self.max_tokens)

    def check(self) -> None:
        super().check()
        if self.stream and self.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs", "are not streamed", hint="leave `stream` out, or use `echo`")
        if self.n * len(self.prompt) > MAX_CHOICES:
            found = f"{len(self.prompt)} prompts with {self.n} answers each"
            raise RequestError("prompt", found, allowed=f"{MAX_CHOICES} answers")


def _is_tokens(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(type(token) is int for token in given)


def read_request(kind: type[R], body: Any, limits: HttpLimits = DEFAULT_LIMITS) -> R:
    """`body` (decoded JSON) as a request. Raises RequestError naming the field."""
    if not isinstance(body, dict):
        raise RequestError(None, "the body is not a JSON object")
    _check_num_parts(body.get("messages"), limits)
    fields = {}
    for key, value in body.items():
        if value is None or key in NO_EFFECT:
            continue
        if key in NEUTRAL:
            if not any(type(value) is type(one) and value == one for one in NEUTRAL[key]):  # True is no 1
                allowed = f"{NEUTRAL[key][0]!r}, or leave it out"
                raise RequestError(key, f"{value!r} is not supported", allowed=allowed)
        elif key not in kind.model_fields:
            known = sorted({*kind.model_fields, *NEUTRAL, *NO_EFFECT})
            raise RequestError(key, "unknown field", allowed=", ".join(known), hint=did_you_mean(key, known))
        elif key == "logit_bias" and isinstance(value, dict) and len(value) > MAX_BIASES:  # else each is looked at
            raise RequestError(key, f"has {len(value)} items", allowed=f"at most {MAX_BIASES} items")
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


def _check_num_parts(messages: Any, limits: HttpLimits) -> None:
    """Raises RequestError for more than a gateway looks at: while it looks, it does nothing else."""
    if not isinstance(messages, list):
        return
    if len(messages) > limits.max_messages:
        raise RequestError("messages", f"are {len(messages)}", allowed=f"up to {limits.max_messages}")
    num_parts = 0
    for place, message in enumerate(messages):
        for field in ("content", "tool_calls", "annotations") if isinstance(message, dict) else ():
            num_parts += len(message[field]) if isinstance(message.get(field), list) else 0
            if num_parts > limits.max_parts:
                where, allowed = f"messages.{place}.{field}", f"up to {limits.max_parts} in all messages"
                raise RequestError(where, f"makes it {num_parts} parts and calls", allowed=allowed)


def _request_error(error: ValidationError) -> RequestError:
    """The problem that says most: where a field may be a text or a list, the one about what was given."""
    if error.error_count() > MAX_PROBLEMS:
        return RequestError(None, f"{error.error_count()} things are wrong in the body")

    def depth(problem: Any) -> tuple[bool, int]:
        return problem["type"] not in ("string_type", "list_type"), len(problem["loc"])

    worst = max(error.errors(include_url=False), key=depth)
    branches = ("str", "constrained-str", "[key]", NamedTool.__name__)  # which of a field's types was tried; and these:
    path = [
        str(part) for part in worst["loc"] if part not in branches and not str(part).startswith(("list[", "literal["))
    ]
    return RequestError(".".join(path) or None, worst["msg"])
