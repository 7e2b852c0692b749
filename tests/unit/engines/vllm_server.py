"""vLLM's OpenAI server in miniature, over the embedded engine: its fields, its names, its ways to say no.

It refuses every field that vLLM 0.32 does not have, so that a request which vLLM would ignore in silence fails here.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from lmray.engines.base import Request as EngineRequest
from lmray.engines.base import Sampling, TokenEvent, TokenLogprob
from lmray.engines.native import Native
from lmray.errors import LmrayError
from lmray.models.load import load_model

FIELDS = {
    "model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty",
    "frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "prompt_logprobs", "stream", "stop_token_ids",
    "return_token_ids", "return_tokens_as_token_ids", "cache_salt",
}  # fmt: skip
NAME = "lmray-base"


class VllmServer:
    """One model, adapters by path; `loads` says whether they may come while it runs."""

    def __init__(self, folder: Path, stops: tuple[int, ...], *, key: str | None = None, loads: bool = True, **sizes):
        self.stops, self.key, self.loads = stops, key, loads
        config = Native(**{"max_batch_size": 4, "max_adapters": 4, "max_length": 128, **sizes})
        self.engine = config.start(load_model(folder, "float32"), stop_token_ids=stops, threads=1)
        self.adapters: dict[str, str] = {}
        self.bodies: list[dict[str, Any]] = []
        self.num = 0

    def app(self) -> FastAPI:
        app = FastAPI(lifespan=self._lifespan)
        app.middleware("http")(self._guard)
        app.add_api_route("/health", lambda: Response(), methods=["GET"])
        app.add_api_route("/metrics", self.metrics, methods=["GET"])
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/v1/completions", self.complete, methods=["POST"])
        if self.loads:
            app.add_api_route("/v1/load_lora_adapter", self.load, methods=["POST"])
            app.add_api_route("/v1/unload_lora_adapter", self.unload, methods=["POST"])
        return app

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        yield
        await self.engine.close()

    async def _guard(self, http: Request, call_next) -> Response:
        """vLLM's key covers `/v1` alone, and its refusal is no error of OpenAI's form."""
        given = http.headers.get("authorization")
        if self.key is not None and http.url.path.startswith("/v1") and given != f"Bearer {self.key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        return await call_next(http)

    async def metrics(self) -> Response:
        stats = self.engine.stats()
        return PlainTextResponse(
            "# HELP vllm:num_requests_running Number of requests in model execution batches.\n"
            "# TYPE vllm:num_requests_running gauge\n"
            f'vllm:num_requests_running{{engine="0",model_name="{NAME}"}} {stats["running"]}.0\n'
            "# HELP vllm:generation_tokens_total Number of generation tokens processed.\n"
            "# TYPE vllm:generation_tokens_total counter\n"
            f'vllm:generation_tokens_total{{engine="0",model_name="{NAME}"}} {stats["generated_tokens"]}.0\n'
        )

    async def models(self) -> dict[str, Any]:
        cards = [{"id": NAME, "root": "folder", "parent": None}]
        cards += [{"id": name, "root": path, "parent": NAME} for name, path in self.adapters.items()]
        return {"object": "list", "data": cards}

    async def load(self, http: Request) -> Response:
        asked = await http.json()
        name, path = asked["lora_name"], asked["lora_path"]
        if name in self.adapters:
            return _error(400, f"The lora adapter '{name}' has already been loaded.")
        try:
            await self.engine.add_adapter(name, Path(path))
        except LmrayError as error:
            return _error(500, str(error))
        self.adapters[name] = path
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, http: Request) -> Response:
        name = (await http.json())["lora_name"]
        if self.adapters.pop(name, None) is None:
            return _error(404, f"The lora adapter '{name}' cannot be found.")
        await self.engine.remove_adapter(name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def complete(self, http: Request) -> Response:
        body = await http.json()
        self.bodies.append(body)
        if odd := sorted(set(body) - FIELDS):
            return _error(400, f"unknown fields {odd}")
        if body["model"] not in (NAME, *self.adapters):
            return _error(404, f"The model `{body['model']}` does not exist.")
        if len(body["prompt"]) + body["max_tokens"] > self.engine.capabilities.max_length:
            return _error(400, "'max_tokens' is too large: this model's maximum context length is shorter.")
        if body["stream"] and body.get("prompt_logprobs"):
            return _error(400, "`prompt_logprobs` are not available when `stream=True`.")
        self.num += 1
        request = self._request(body)
        if body["stream"]:
            return StreamingResponse(self._stream(request, body), media_type="text/event-stream")
        events = [event async for event in self.engine.submit(request)]
        choice = self._choice(events, body)
        if body.get("prompt_logprobs") is not None:
            read = events[0].prompt_logprobs or ()
            choice["prompt_logprobs"] = [None if one is None else _entries(one) for one in read]
        return JSONResponse({"object": "text_completion", "choices": [choice]})

    def _request(self, body: dict[str, Any]) -> EngineRequest:
        same = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty")
        same += ("frequency_penalty", "presence_penalty", "logprobs", "prompt_logprobs")
        told: dict[str, Any] = {name: body[name] for name in same if name in body}
        biases = body.get("logit_bias", {})
        sampling = Sampling(**told, logit_bias=tuple((int(token), bias) for token, bias in biases.items()))
        adapter = None if body["model"] == NAME else body["model"]
        return EngineRequest(str(self.num), tuple(body["prompt"]), sampling, adapter, body.get("cache_salt", ""))

    async def _stream(self, request: EngineRequest, body: dict[str, Any]) -> AsyncIterator[str]:
        async for event in self.engine.submit(request):
            yield f"data: {json.dumps({'choices': [self._choice([event], body)]}, ensure_ascii=False)}\n\n"
        yield "data: [DONE]\n\n"

    def _choice(self, events: list[TokenEvent], body: dict[str, Any]) -> dict[str, Any]:
        """With the stop token among the ids, as vLLM has it; its text is a line that some would cut in two."""
        ids = [event.token_id for event in events if event.token_id is not None]
        choice = {"index": 0, "text": "one\u2028line", "finish_reason": events[-1].finish_reason, "logprobs": None}
        if events[-1].finish_reason == "stop":
            ids.append(self.stops[-1])
        told = [event.logprob for event in events if event.logprob is not None]
        if body.get("logprobs") is not None:
            assert body["return_tokens_as_token_ids"]
            choice["logprobs"] = {
                "tokens": [f"token_id:{one.token_id}" for one in told],
                "token_logprobs": [one.logprob for one in told],
                "top_logprobs": [
                    {f"token_id:{token}": value for token, value in ((one.token_id, one.logprob), *one.top)}
                    for one in told
                ],
            }
        return choice | ({"token_ids": ids} if body.get("return_token_ids") else {})


def _entries(one: TokenLogprob) -> dict[str, Any]:
    return {str(token): {"logprob": value} for token, value in (*one.top, (one.token_id, one.logprob))}


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "BadRequestError", "code": status}}, status)
