"""An engine over a server, and a server that says what a test tells it to."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse

from lmray.engines.base import Request as EngineRequest
from lmray.engines.base import Sampling, TokenEvent
from lmray.engines.openai import Openai
from tests.unit.engines.conftest import NUM_NEW, STOP
from tests.unit.engines.vllm_server import NAME

MAX_LENGTH = 128


class Running:
    """An engine over the server at `url` for the length of a block."""

    def __init__(self, url: str, model, tokenizer=None, **changes):
        config = Openai(**{"url": url, "model": NAME, "max_batch_size": 4, "max_length": MAX_LENGTH, **changes})
        self.engine = config.start(model, stop_token_ids=STOP, threads=1, tokenizer=tokenizer)

    async def __aenter__(self):
        return self.engine

    async def __aexit__(self, *exc_info):
        await self.engine.close()


class Scripted:
    """A server that answers completions with `status` and `parts`, then hangs or ends."""

    def __init__(self, *parts: str, status: int = 200, hangs: bool = False):
        self.parts, self.status, self.hangs = parts, status, hangs
        self.left = threading.Event()
        self.bodies: list[dict[str, Any]] = []

    def app(self) -> FastAPI:
        app = FastAPI()
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/v1/completions", self.complete, methods=["POST"])
        return app

    async def models(self):
        return {"data": [{"id": NAME}, {"id": "helper"}]}

    async def complete(self, http: Request) -> Response:
        self.bodies.append(await http.json())
        return StreamingResponse(self._say(), self.status)

    async def _say(self):
        try:
            for part in self.parts:
                yield part
            if self.hangs:
                await asyncio.Event().wait()
        finally:
            self.left.set()


def chunk(**choice) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, 'text': '', 'finish_reason': None, **choice}]})}\n\n"


def request(prompt=(5, 6, 7), name: str = "request", adapter: str | None = None, **sampling) -> EngineRequest:
    return EngineRequest(name, tuple(prompt), Sampling(**{"max_tokens": NUM_NEW, **sampling}), adapter, "salt")


async def events(engine, asked: EngineRequest) -> list[TokenEvent]:
    return [event async for event in engine.submit(asked)]


def run(url: str, model, ask, tokenizer=None, **changes):
    async def main():
        async with Running(url, model, tokenizer, **changes) as engine:
            return await ask(engine)

    return asyncio.run(main())
