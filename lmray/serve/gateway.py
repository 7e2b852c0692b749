"""The HTTP side of serving: a FastAPI app that speaks OpenAI's chat protocol over a `Backend`.

Runs in one process or in a Serve deployment; it knows tokens, text, keys and errors, and no engine. No CORS: a browser
page of another origin has no business here.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from transformers import PreTrainedTokenizerBase

from lmray.engines.base import Request as EngineRequest
from lmray.engines.base import TokenEvent
from lmray.errors import LmrayError, did_you_mean
from lmray.serve.answer import Backend, make_answer, make_request
from lmray.serve.disconnect import ClientGoneError, until_gone
from lmray.serve.failures import AnswerError, failure_of
from lmray.serve.keys import is_known
from lmray.serve.openai import (
    ChatRequest,
    RequestError,
    chunk,
    completion,
    error_body,
    model_list,
    read_chat_request,
    token_usage,
    usage_chunk,
)

CLIENT_CLOSED = 499
"""Nobody reads it; it shows in logs that the client left."""


@dataclass(frozen=True)
class GatewaySettings:
    """What a gateway must know besides its backend."""

    model: str
    """The base model's name in requests."""
    max_length: int
    """Longest sequence of the engine, prompt and answer together, in tokens."""
    key_hashes: tuple[str, ...] = ()
    """SHA-256 of the keys that are let in. Empty: no key is asked for."""
    max_body_bytes: int = 2**20


def make_app(backend: Backend, tokenizer: PreTrainedTokenizerBase, settings: GatewaySettings) -> FastAPI:
    """The app: `/v1/models`, `/v1/chat/completions`, `/health`, `/ready`."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gateway = _Gateway(backend, tokenizer, settings)
    app.add_api_route("/health", _health, methods=["GET"])
    app.add_api_route("/ready", gateway.ready, methods=["GET"])
    app.add_api_route("/v1/models", gateway.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", gateway.model, methods=["GET"])
    app.add_api_route("/v1/chat/completions", gateway.chat, methods=["POST"])
    for kind in (LmrayError, AnswerError, Exception):
        app.add_exception_handler(kind, _answer_failure)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(ClientGoneError, _answer_gone)
    return app


async def _health() -> dict[str, str]:
    return {"status": "alive"}


class _Gateway:
    """The routes, over one backend."""

    def __init__(self, backend: Backend, tokenizer: PreTrainedTokenizerBase, settings: GatewaySettings):
        self._backend, self._tokenizer, self._settings = backend, tokenizer, settings
        self._created = int(time.time())

    async def ready(self) -> Response:
        """200 once a request would be answered, 503 with the reason until then."""
        try:
            return JSONResponse({"status": "ready", "models": list(await self._names())})
        except LmrayError as error:
            return JSONResponse(failure_of(error).body, 503)

    async def models(self, http: Request) -> dict[str, Any]:
        self._authorise(http)
        return model_list(await self._names(), self._created)

    async def model(self, http: Request, name: str) -> dict[str, Any]:
        self._authorise(http)
        names = await self._names()
        self._adapter(name, names)
        return next(entry for entry in model_list(names, self._created)["data"] if entry["id"] == name)

    async def chat(self, http: Request) -> Response:
        self._authorise(http)
        chat = read_chat_request(await self._body(http))
        adapter = self._adapter(chat.model, await self._names())
        request = make_request(chat, adapter, self._tokenizer, self._settings.max_length)
        head = {"id": request.id, "created": int(time.time()), "model": chat.model}
        events = until_gone(http, self._backend.stream(request))
        if not chat.stream:
            return JSONResponse(await self._whole(head, chat, request, events))
        first = await anext(events)  # what fails before the first token is answered with a status, not in the stream
        return StreamingResponse(self._pieces(head, chat, request, first, events), media_type="text/event-stream")

    async def _whole(
        self,
        head: Mapping[str, Any],
        chat: ChatRequest,
        request: EngineRequest,
        events: AsyncGenerator[TokenEvent, None],
    ) -> dict[str, Any]:
        answer, text, calls, reason = make_answer(chat, self._tokenizer), [], [], None
        async with aclosing(events):
            while reason is None:
                piece = answer.push(await anext(events))
                text.append(piece.text)
                calls += piece.calls
                reason = piece.finish_reason
        usage = token_usage(len(request.prompt_ids), answer.num_tokens)
        return completion(head, "".join(text), reason, usage, calls=calls)

    async def _pieces(
        self,
        head: Mapping[str, Any],
        chat: ChatRequest,
        request: EngineRequest,
        event: TokenEvent,
        events: AsyncGenerator[TokenEvent, None],
    ) -> AsyncIterator[str]:
        """Server-sent events of one answer; an error on the way is sent as an event, since the status is out."""
        answer, reason, num_calls = make_answer(chat, self._tokenizer), None, 0
        yield _sse(chunk(head, {"role": "assistant", "content": ""}))
        async with aclosing(events):
            try:
                while reason is None:
                    piece = answer.push(event)
                    reason = piece.finish_reason
                    if piece.text:
                        yield _sse(chunk(head, {"content": piece.text}))
                    for place, call in enumerate(piece.calls, start=num_calls):
                        yield _sse(chunk(head, {"tool_calls": [{"index": place, **call}]}))
                    num_calls += len(piece.calls)
                    if reason is None:
                        event = await anext(events)
            except LmrayError as error:
                yield _sse(failure_of(error).body)
                return
            except ClientGoneError:
                return
        yield _sse(chunk(head, {}, reason))
        if chat.stream_options is not None and chat.stream_options.include_usage:
            yield _sse(usage_chunk(head, token_usage(len(request.prompt_ids), answer.num_tokens)))
        yield "data: [DONE]\n\n"

    async def _names(self) -> dict[str, str | None]:
        """Every name a request may give as `model`, with the adapter behind it; None is the base model."""
        base = self._settings.model
        names: dict[str, str | None] = {base: None}
        for adapter in await self._backend.adapters():
            names |= {adapter: adapter, f"{base}:{adapter}": adapter}
        return names

    def _adapter(self, model: str, names: Mapping[str, str | None]) -> str | None:
        if model not in names:
            close = did_you_mean(model, names)
            found = f"unknown model `{model}`; there are: {', '.join(names)}" + (f"; {close}" if close else "")
            raise AnswerError(
                404, error_body(found, kind="invalid_request_error", code="model_not_found", param="model")
            )
        return names[model]

    def _authorise(self, http: Request) -> None:
        if not self._settings.key_hashes:
            return
        scheme, _, key = http.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not is_known(key.strip(), self._settings.key_hashes):
            found = "wrong API key" if key else "no API key; send `Authorization: Bearer KEY`"
            body = error_body(found, kind="invalid_request_error", code="invalid_api_key")
            raise AnswerError(401, body, {"WWW-Authenticate": "Bearer"})

    async def _body(self, http: Request) -> Any:
        """The decoded JSON body, read no further than allowed."""
        limit, content = self._settings.max_body_bytes, bytearray()
        async for part in http.stream():
            content += part
            if len(content) > limit:
                found = f"the body is longer than {limit} bytes"
                raise AnswerError(413, error_body(found, kind="invalid_request_error", code="request_too_large"))
        try:
            return json.loads(content)
        except ValueError as error:
            raise RequestError(None, f"the body is not JSON: {error}") from None


def _sse(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _answer_failure(http: Request, error: Exception) -> Response:
    failure = error if isinstance(error, AnswerError) else failure_of(error)
    return JSONResponse(failure.body, failure.status, headers=dict(failure.headers))


async def _answer_http(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    found = f"{http.method} {http.url.path}: {error.detail}"
    return JSONResponse(error_body(found, kind="invalid_request_error"), error.status_code, headers=error.headers)


async def _answer_gone(http: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED)
