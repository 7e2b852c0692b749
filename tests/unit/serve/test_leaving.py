"""Clients that leave, over the embedded engine: at each stage the engine's place is free at once."""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing
from typing import Any

import pytest

from lmray.engines.base import Request, Sampling
from lmray.models.load import load_tokenizer
from lmray.serve.gateway import GatewaySettings, make_app
from lmray.testing.tiny import tiny_model_folder
from tests.unit.serve.asgi import post
from tests.unit.serve.servers import MAX_LENGTH, EngineBackend

CHUNK = 16
PROMPT = "a prompt that is read in many steps " * 8


class Held(EngineBackend):
    """An engine that stops before a step, as often as it is told, until the test lets it go on."""

    def __init__(self, folder):
        super().__init__(folder, max_batch_size=1, max_prefill_tokens=CHUNK)
        self.core: Any = self.engine._stepper
        self.steps_before = 0
        self.reached, self.go_on = threading.Event(), threading.Event()
        step = self.core.step

        def held_step() -> Any:
            if self.steps_before == 0 and not self.reached.is_set():
                self.reached.set()
                assert self.go_on.wait(60)
            self.steps_before -= 1
            return step()

        self.core.step = held_step
        self.asked: list[str] = []

    async def stream(self, request: Request):
        self.asked.append(request.id)
        async with aclosing(super().stream(request)) as events:
            async for event in events:
                yield event


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("leaving") / "tiny")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stage", ["queued", "prefill", "decoding"])
def test_a_client_that_leaves_gives_its_place_back_at_once(folder, stage, stream):
    async def main() -> dict[str, Any]:
        backend = Held(folder)
        app = make_app(backend, load_tokenizer(folder), GatewaySettings("tiny", MAX_LENGTH))
        # the prompt's chunks, then one token a step
        backend.steps_before = {"queued": 1, "prefill": 4, "decoding": len(PROMPT) // CHUNK + 5}[stage]
        gone = asyncio.Event()
        other = None
        if stage == "queued":
            other = asyncio.ensure_future(answer(backend, Request("other", (5,) * 100, Sampling(4))))
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 200, "n": 2, "stream": stream}
        leaving = asyncio.ensure_future(post(app, "/v1/completions", body, gone=gone))
        await asyncio.to_thread(backend.reached.wait, 60)
        while len(backend.asked) < 2 + (other is not None):
            await asyncio.sleep(0)  # a step of the loop, not a time
        gone.set()
        await leaving
        backend.go_on.set()
        if other is not None:
            await other
        await answer(backend, Request("next", (5, 6, 7), Sampling(2)))  # there is one place, and it is free
        stats = backend.engine.stats()
        await backend.engine.close()
        return stats

    stats = asyncio.run(main())
    assert (stats["running"], stats["waiting"]) == (0, 0)
    assert stats["generated_tokens"] < 30, "it was answered although nobody was there"
    assert stats["free_blocks"] == stats["num_blocks"]


async def answer(backend: Held, request: Request) -> list[int | None]:
    return [event.token_id async for event in backend.stream(request)]
