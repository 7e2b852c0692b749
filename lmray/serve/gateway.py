"""The HTTP side of serving: a FastAPI app that speaks OpenAI's protocol over a `Backend`.

Runs in one process or in a Serve deployment; it knows tokens, text, keys and errors, and no engine. No CORS: a browser
page of another origin has no business here.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from transformers import PreTrainedTokenizerBase

from lmray import __version__
from lmray.config.endpoint import HttpLimits
from lmray.data.filters.base import TextFilter
from lmray.engines.base import Request as EngineRequest
from lmray.errors import LmrayError, did_you_mean
from lmray.serve.account import Account
from lmray.serve.answer import Backend, Piece, Question
from lmray.serve.body import decode, read_body
from lmray.serve.disconnect import ClientGoneError, unless_gone, until_gone
from lmray.serve.envelope import CLIENT_CLOSED, answer_failures
from lmray.serve.failures import AnswerError, error_body, failure_of
from lmray.serve.filters import of_answers
from lmray.serve.forms import Chat, Completion, Form, engine_requests
from lmray.serve.generate import answer_pieces, side_by_side
from lmray.serve.guided import check_grammar
from lmray.serve.json_text import json_parts
from lmray.serve.keys import ApiKey, find_key
from lmray.serve.metrics import Metrics
from lmray.serve.openai import ChatRequest, CompletionRequest, read_request
from lmray.serve.openapi import openapi_document
from lmray.serve.page import add_page
from lmray.serve.prompt_filters import PromptFilters
from lmray.serve.quotas import Quotas
from lmray.serve.visitors import STAGE, VISITOR

T = TypeVar("T")
Pieces = AsyncGenerator[tuple[int, Piece], None]
"""Pieces of all answers to one request, each with its answer's index."""
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\u0085\u2028\u2029"}
"""Ends of lines to clients that split a stream as Python splits text, and none to the protocol."""
READERS = 4
"""Bodies and prompts that are read at a time; more wait."""
MAX_NAMED = 20
"""Models that an error names."""


@dataclass(frozen=True)
class GatewaySettings:
    """What a gateway must know besides its backend."""

    model: str
    """The base model's name in requests."""
    max_length: int
    """Longest sequence of the engine, prompt and answer together, in tokens."""
    keys: tuple[ApiKey, ...] = ()
    """Those that are let in. Empty: no key is asked for."""
    limits: HttpLimits = field(default_factory=HttpLimits)
    filters: tuple[TextFilter, ...] = ()
    aliases: Callable[[], Mapping[str, tuple[str, str]]] = dict
    """Other names of adapters (`NAME@STAGE`), that are answered to and not listed, with the adapter's own and the
    stage."""
    sends_request_id: bool = True
    """Whether answers carry `x-request-id`; off where what stands before the gateway puts it there."""
    page: bool = True
    """Whether there is a page for people at `/`, and `/load` for it."""


def make_app(backend: Backend, tokenizer: PreTrainedTokenizerBase, settings: GatewaySettings) -> FastAPI:
    """The app: `/v1/models`, `/v1/chat/completions`, `/v1/completions`, `/health`, `/ready`, `/metrics`, and
    `/openapi.json`, which describes them."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gateway = _Gateway(backend, tokenizer, settings)
    app.state.metrics = gateway.metrics
    app.add_api_route("/health", _health, methods=["GET"])
    app.add_api_route("/openapi.json", gateway.described, methods=["GET"])
    app.add_api_route("/ready", gateway.ready, methods=["GET"])
    app.add_api_route("/metrics", gateway.page, methods=["GET"])
    app.add_api_route("/v1/models", gateway.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", gateway.model, methods=["GET"])
    app.add_api_route("/v1/chat/completions", gateway.chat, methods=["POST"])
    app.add_api_route("/v1/completions", gateway.complete, methods=["POST"])
    if settings.page:
        add_page(app, backend, gateway.metrics, gateway.check_watcher)
    answer_failures(app, metrics=gateway.metrics, sends_request_id=settings.sends_request_id)
    return app


async def _health() -> dict[str, str]:
    return {"status": "alive"}


class _Gateway:
    """The routes, over one backend."""

    def __init__(self, backend: Backend, tokenizer: PreTrainedTokenizerBase, settings: GatewaySettings):
        self._backend, self._tokenizer, self._settings = backend, tokenizer, settings
        self._created = int(time.time())
        self._filters = PromptFilters(settings.filters, tokenizer)
        self._quotas = Quotas(settings.keys, time.monotonic)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="lmray-tokenise")
        for one in settings.filters:
            one.open().push("a.b@example.com", last=True)  # loads what it needs before anybody waits for it
        tokenizer("")  # the first call may change its settings, which must not happen while another thread reads
        self._document = openapi_document(version=__version__, has_keys=bool(settings.keys))
        self.metrics = Metrics()

    async def described(self) -> Response:
        """The OpenAPI document."""
        return JSONResponse(self._document)

    async def ready(self) -> Response:
        """200 while a request would be answered, 503 with the reason else. An endpoint that goes down to no replica
        while nothing is asked is ready: it starts one for the next request."""
        try:
            await self._backend.ready()
            names = await self._names()
        except LmrayError as error:
            return JSONResponse(failure_of(error).body, 503)
        return JSONResponse({"status": "ready"} | ({} if self._settings.keys else {"models": list(names)}))

    async def page(self, http: Request) -> Response:
        """The metrics, without a key or for keys that may read them."""
        self.check_watcher(http)
        return Response(await self.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def check_watcher(self, http: Request) -> None:
        """Raises AnswerError for a key that may not see what all keys do."""
        key = self._key(http)
        if key is not None and not key.metrics:
            raise AnswerError(403, error_body("this key may not read metrics", code="not_allowed"))

    async def models(self, http: Request) -> dict[str, Any]:
        key = self._key(http)
        return {"object": "list", "data": [self._card(*one) for one in (await self._names(key)).items()]}

    async def model(self, http: Request, name: str) -> dict[str, Any]:
        key = self._key(http)
        return self._card(name, await self._adapter(name, key))

    async def chat(self, http: Request) -> Response:
        limits = self._settings.limits
        return await self._answer(http, lambda body: Chat(read_request(ChatRequest, body, limits), self._tokenizer))

    async def complete(self, http: Request) -> Response:
        return await self._answer(http, lambda body: Completion(read_request(CompletionRequest, body), self._tokenizer))

    async def _answer(self, http: Request, form_of: Callable[[Any], Form]) -> Response:
        """Reads what is asked and answers it. The key's requests count before the body is there; another thread
        decodes it and tokenises its prompts; then its tokens count."""
        key, account, limits = self._key(http), _account(http), self._settings.limits
        take = account.leaving.enter_context(self._quotas.using(key, lambda: account.num_answer_tokens))
        content = await read_body(http, limits)
        form = await self._beside(http, lambda: form_of(decode(content)))
        adapter = await self._adapter(form.asked.model, key)
        account.model = adapter or self._settings.model
        requests = await self._beside(http, lambda: self._read(form, adapter, account))
        num_prompt_tokens = sum(len(request.prompt_ids) for request, _ in requests) // form.asked.n
        take(num_prompt_tokens)
        account.ask(num_prompt_tokens)
        filters = of_answers(self._settings.filters)
        answers = [
            answer_pieces(self._backend, request, form.answer(question, filters), account)
            for request, question in requests
        ]
        pieces = until_gone(http, side_by_side(answers), timeout_s=limits.answer_timeout_s)
        account.leaving.push_async_callback(pieces.aclose)
        head = {"id": form.id, "created": int(time.time()), "model": form.asked.model}
        if not form.asked.stream:
            return Response(await _whole(head, form, len(answers), pieces, account), media_type="application/json")
        first = await anext(pieces)  # what fails before the first token is answered with a status, not in the stream
        events = _events(head, form, len(answers), _with(first, pieces), account)
        return StreamingResponse(events, media_type="text/event-stream")

    async def _beside(self, http: Request, work: Callable[[], T]) -> T:
        """What `work` gives, of a reader's thread. Raises ClientGoneError once the client has left."""
        return await unless_gone(http, asyncio.get_running_loop().run_in_executor(self._readers, work))

    def _read(self, form: Form, adapter: str | None, account: Account) -> list[tuple[EngineRequest, Question]]:
        """What the engine is asked. Takes as long as the prompts are; raises RequestError and AnswerError."""
        check_grammar(form.asked.grammar, where=form.asked.grammar_field)
        max_length, salt = self._settings.max_length, account.key  # or a key could tell by the time what others asked
        requests = engine_requests(form, adapter, max_length, cache_salt=salt)
        if self._filters.replace(form, account):  # after a first look, that refuses a prompt too long to search
            requests = engine_requests(form, adapter, max_length, cache_salt=salt)
        self._filters.check(form, [question for _, question in requests[:: form.asked.n]], account)
        return requests

    async def _names(self, key: ApiKey | None = None) -> dict[str, str | None]:
        """Every name that a request with `key` may give as `model`, with the adapter behind it; None is the base
        model."""
        base = self._settings.model
        names: dict[str, str | None] = {base: None}
        for adapter in await self._backend.adapters():
            names |= {adapter: adapter, f"{base}:{adapter}": adapter}
        return {name: adapter for name, adapter in names.items() if key is None or key.may_ask(adapter or base)}

    async def _adapter(self, model: str, key: ApiKey | None) -> str | None:
        """The adapter behind `model` in a request with `key`; None is the base model. Raises AnswerError."""
        base, adapters = self._settings.model, await self._backend.adapters()  # which brings aliases up to date as well
        plain = model.removeprefix(f"{base}:")
        adapter, stage = (None, "") if model == base else self._settings.aliases().get(plain, (plain, ""))
        STAGE.set(stage)
        if (adapter is None or adapter in adapters) and (key is None or key.may_ask(adapter or base)):
            return adapter
        names = await self._names(key)
        if key is not None and key.models:  # whether there is one of that name is not this key's to know
            found = f"this key may not ask `{model}`; it may ask: {_listed(names) or 'none that is served'}"
            raise AnswerError(403, error_body(found, code="model_not_allowed", param="model"))
        close = did_you_mean(model, names)
        found = f"unknown model `{model}`; there are: {_listed(names)}" + (f"; {close}" if close else "")
        raise AnswerError(404, error_body(found, code="model_not_found", param="model"))

    def _card(self, name: str, adapter: str | None) -> dict[str, Any]:
        parent = self._settings.model if adapter else None
        return {"id": name, "object": "model", "created": self._created, "owned_by": "lmray", "parent": parent}

    def _key(self, http: Request) -> ApiKey | None:
        """The request's key; None where none is asked for. Raises AnswerError (401) for none or a wrong one."""
        account = _account(http)
        account.path = http.scope["route"].path
        VISITOR.set("")
        if not self._settings.keys:
            return None
        scheme, _, given = http.headers.get("authorization", "").partition(" ")
        key = find_key(given.strip(), self._settings.keys) if scheme.lower() == "bearer" else None
        if key is None:
            found = "wrong API key" if given else "no API key; send `Authorization: Bearer KEY`"
            raise AnswerError(401, error_body(found, code="invalid_api_key"), {"WWW-Authenticate": "Bearer"})
        account.key = key.name
        VISITOR.set(key.name)
        return key


def _listed(names: Iterable[str]) -> str:
    """So many as a person reads."""
    first, more = list(names)[:MAX_NAMED], len(list(names)) - MAX_NAMED
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")


def _account(http: Request) -> Account:
    return http.state.account


async def _whole(head: Mapping[str, Any], form: Form, num: int, pieces: Pieces, account: Account) -> bytes:
    """The answer of a request without `stream`, as JSON."""
    found: list[list[Piece]] = [[] for _ in range(num)]
    async with aclosing(pieces):
        async for index, piece in pieces:
            found[index].append(piece)

    def written() -> bytes:
        choices = [form.whole(index, one) for index, one in enumerate(found)]
        body = {**head, "object": form.whole_object, "choices": choices, "usage": _usage(account)}
        return "".join(json_parts(body)).encode()

    return await _formed(form, written)


async def _events(
    head: Mapping[str, Any], form: Form, num: int, pieces: Pieces, account: Account
) -> AsyncIterator[str]:
    """Server-sent events of all answers; an error on the way is sent as an event, since the status is out."""
    told = form.asked.include_usage
    frame = {**head, "object": form.piece_object} | ({"usage": None} if told else {})
    for index in range(num):
        for choice in form.opening(index):
            yield _sse({**frame, "choices": [choice]})
    try:
        async with aclosing(pieces):
            async for index, piece in pieces:
                for choice in form.streamed(index, piece):
                    yield _sse({**frame, "choices": [choice]})
    except ClientGoneError:
        account.status = CLIENT_CLOSED
        return
    except Exception as error:
        failure = failure_of(error)
        account.status = failure.status
        yield _sse(failure.body)
        return
    if told:
        yield _sse({**frame, "choices": [], "usage": _usage(account)})
    yield "data: [DONE]\n\n"


async def _formed(form: Form, work: Callable[[], T]) -> T:
    """What `work` gives, on another thread where log probabilities make it long."""
    asked = form.asked
    long = asked.num_logprobs is not None or asked.num_prompt_logprobs is not None
    return await asyncio.to_thread(work) if long else work()


async def _with(first: tuple[int, Piece], pieces: Pieces) -> Pieces:
    """`first` and what follows it."""
    async with aclosing(pieces):
        yield first
        async for one in pieces:
            yield one


def _usage(account: Account) -> dict[str, int]:
    return {
        "prompt_tokens": account.num_prompt_tokens,
        "completion_tokens": account.num_answer_tokens,
        "total_tokens": account.num_tokens,
    }


def _sse(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text.translate(_LINE_ENDS)}\n\n"
