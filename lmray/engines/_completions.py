"""Requests for tokens as OpenAI's `/v1/completions`, and its answers as tokens again.

`ExactTokens` reads vLLM's extensions of the protocol, which tell the ids of tokens; `TextTokens` reads what every
server sends: text, whose tokens are then those that the model's tokenizer writes it with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from lmray.engines.base import FinishReason, Request, Sampling, TokenEvent, TokenLogprob
from lmray.errors import DataError, RemoteError

_TOKEN_ID = re.compile(r"token_id:(\d+)")
_NEUTRAL = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Fields that OpenAI does not have, and the values that change nothing."""
_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


class Dialect(Protocol):
    """How one request is asked and its answer read."""

    def body(self, model: str) -> dict[str, Any]:
        """What is sent."""
        ...

    def read(self, choice: dict[str, Any]) -> Iterator[TokenEvent]:
        """The tokens of one part of the answer. Raises RemoteError for one that tells none, KeyError, TypeError,
        ValueError or IndexError for what is no answer."""
        ...


class ExactTokens:
    """As vLLM tells them: ids, log probabilities by id, stop tokens and prefix salts by its names."""

    def __init__(self, request: Request, stop_token_ids: Sequence[int]):
        self._request, self._stops = request, frozenset(stop_token_ids)
        self._prompt_logprobs: Any = None
        self._is_first = True

    def body(self, model: str) -> dict[str, Any]:
        request, sampling = self._request, self._request.sampling
        body = _body(request, model) | {name: getattr(sampling, name) for name in _NEUTRAL}
        body |= {"return_token_ids": True, "stop_token_ids": sorted(self._stops)}
        if sampling.logprobs is not None:
            body |= {"logprobs": sampling.logprobs, "return_tokens_as_token_ids": True}
        if sampling.prompt_logprobs is not None:  # which are not streamed
            body |= {"prompt_logprobs": sampling.prompt_logprobs, "stream": False}
        if sampling.grammar is not None:
            body["structured_outputs"] = {"json": _schema(request.id, sampling.grammar)}
        return body | ({"cache_salt": request.cache_salt} if request.cache_salt else {})

    def read(self, choice: dict[str, Any]) -> Iterator[TokenEvent]:
        token_ids, reason = choice.get("token_ids"), _reason(choice)
        if token_ids is None:
            hint = "vLLM does since 0.10.2; set `engine.tokens: text` for a server that tells text alone"
            raise RemoteError("engine `openai`", "the server tells no ids of tokens", hint=hint)
        sampling, last = self._request.sampling, len(token_ids) - 1
        read = choice.get("prompt_logprobs")
        self._prompt_logprobs = None if read is None else _prompt_logprobs(read, self._request)
        if sampling.max_tokens == 0:  # one was asked for, since servers know no less
            if reason is not None:
                yield self._event(None, "length")
            return
        for place, token_id in enumerate(token_ids):
            logprob = None if sampling.logprobs is None else _logprob(choice["logprobs"], place, token_id, sampling)
            ended = reason if place == last else None
            if token_id in self._stops or (ended == "stop" and token_id == choice.get("stop_reason")):
                yield self._event(None, "stop", logprob)
                return
            yield self._event(token_id, ended, logprob)
        if reason is not None and not token_ids:
            yield self._event(None, reason)

    def _event(
        self, token_id: int | None, reason: FinishReason | None, logprob: TokenLogprob | None = None
    ) -> TokenEvent:
        read, self._is_first = self._prompt_logprobs if self._is_first else None, False
        return TokenEvent(self._request.id, token_id, reason, logprob, read)


class TextTokens:
    """As the tokenizer writes the text that is told. A server may have drawn other tokens, and another number; what the
    protocol tells of them has no place here."""

    def __init__(self, request: Request, tokenizer: PreTrainedTokenizerBase):
        sampling = request.sampling
        if sampling.logprobs is not None or sampling.prompt_logprobs is not None or sampling.max_tokens == 0:
            hint = "set `engine.tokens: ids` for a server that tells them, as vLLM does"
            raise DataError(f"request {request.id}", "log probabilities are not told by text alone", hint=hint)
        self._request, self._tokenizer = request, tokenizer

    def body(self, model: str) -> dict[str, Any]:
        sampling = self._request.sampling
        changed = {name: getattr(sampling, name) for name in _NEUTRAL if getattr(sampling, name) != _NEUTRAL[name]}
        return _body(self._request, model) | changed

    def read(self, choice: dict[str, Any]) -> Iterator[TokenEvent]:
        reason, token_ids = _reason(choice), written(self._tokenizer, choice["text"])
        for place, token_id in enumerate(token_ids):
            yield TokenEvent(self._request.id, token_id, reason if place == len(token_ids) - 1 else None)
        if reason is not None and not token_ids:
            yield TokenEvent(self._request.id, None, reason)


def written(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """`text` in tokens that say it wherever it stands in an answer."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]  # type: ignore[return-value]


def writes_pieces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text that is cut anywhere and written piece by piece stays as it was. Tokenizers that put a space
    before each text write another one."""
    pieces = ["One", " two", "thr", "ee\n", " ", " four", "日本", "語"]
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    ids = [token_id for piece in pieces for token_id in written(tokenizer, piece)]
    return str(tokenizer.decode(ids, **options)) == "".join(pieces)  # type: ignore[arg-type]


def _body(request: Request, model: str) -> dict[str, Any]:
    """What every server knows. All of it is told, for servers have defaults of their own."""
    sampling = request.sampling
    body = {
        "model": model,
        "prompt": list(request.prompt_ids),
        "max_tokens": max(sampling.max_tokens, 1),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "stream": True,
    }
    if sampling.logit_bias:
        body["logit_bias"] = {str(token_id): bias for token_id, bias in sampling.logit_bias}
    return body | ({"seed": sampling.seed} if sampling.seed is not None else {})


def _schema(request_id: str, grammar: str) -> Any:
    """The JSON schema in a grammar of llguidance's. Raises DataError for one of another kind."""
    try:
        (one,) = json.loads(grammar)["grammars"]
        return {key: value for key, value in one["json_schema"].items() if key != "x-guidance"}
    except (ValueError, KeyError, TypeError, AttributeError):
        found = "a server holds answers to JSON schemas, and this grammar is none"
        raise DataError(f"request {request_id}", found, hint="engine `native` takes every grammar") from None


def _reason(choice: dict[str, Any]) -> FinishReason | None:
    reason = choice.get("finish_reason")
    if reason is not None and reason not in _REASONS:
        raise RemoteError("engine `openai`", f"the server ended an answer with `{reason}`", allowed=", ".join(_REASONS))
    return None if reason is None else _REASONS[reason]


def _logprob(told: dict[str, Any], place: int, token_id: int, sampling: Sampling) -> TokenLogprob:
    top = ((_id(name), float(value)) for name, value in (told["top_logprobs"][place] or {}).items())
    likeliest = sorted(top, key=lambda one: -one[1])[: sampling.logprobs or 0]
    return TokenLogprob(token_id, float(told["token_logprobs"][place]), tuple(likeliest))


def _prompt_logprobs(read: list[Any], request: Request) -> tuple[TokenLogprob | None, ...]:
    num_top = request.sampling.prompt_logprobs or 0

    def one(token_id: int, entries: dict[str, Any] | None) -> TokenLogprob | None:
        if entries is None:
            return None
        told = sorted(entries.items(), key=lambda entry: -entry[1]["logprob"])
        top = tuple((int(other), float(entry["logprob"])) for other, entry in told[:num_top])
        return TokenLogprob(token_id, float(entries[str(token_id)]["logprob"]), top)

    return tuple(one(token_id, entries) for token_id, entries in zip(request.prompt_ids, read, strict=True))


def _id(name: str) -> int:
    found = _TOKEN_ID.fullmatch(name)
    if found is None:
        raise ValueError(f"{name!r} is no `token_id:N`")
    return int(found[1])
