"""Servers that do not behave, requests that end early, and what a server tells of itself."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing

import pytest
from fastapi.responses import Response

from lmray.engines.openai import Openai
from lmray.errors import ArtifactError, CapacityError, ConfigError, DataError, LmrayError, RemoteError
from lmray.testing.listening import listening
from tests.unit.engines.conftest import STOP
from tests.unit.engines.remote import Running, Scripted, chunk, events, request, run
from tests.unit.engines.vllm_server import NAME, VllmServer


def test_closing_the_generator_hangs_up_and_frees_the_place(empty):
    server = Scripted(chunk(token_ids=[70]), hangs=True)

    async def ask(engine):
        async with aclosing(engine.submit(request(name="long"))) as answer:
            first = await anext(answer)
            waiting = asyncio.ensure_future(anext(engine.submit(request(name="next"))))
            while not engine.stats()["waiting"]:
                await asyncio.sleep(0)
            during = engine.stats()
        return first, during, await waiting

    with listening(server.app()) as url:
        first, during, second = run(url, empty, ask, max_batch_size=1)
        assert (during["running"], during["waiting"]) == (1, 1)
        assert first.token_id == second.token_id == 70
        assert len(server.bodies) == 2
        assert server.left.wait(60)


def test_an_answer_that_nobody_waits_for_after_its_last_token_leaves_nothing_behind(empty, adapter_folders):
    server = Scripted(chunk(token_ids=[70], finish_reason="length"), hangs=True)

    async def ask(engine):
        await engine.add_adapter("helper@1", adapter_folders["a"])
        came = asyncio.Event()

        async def take():
            async for _ in engine.submit(request(adapter="helper@1")):
                came.set()

        taking = asyncio.ensure_future(take())
        await came.wait()
        taking.cancel()  # while the rest of the answer is waited for
        with pytest.raises(asyncio.CancelledError):
            await taking
        await asyncio.wait_for(engine.remove_adapter("helper@1"), 60)
        return engine.stats()

    with listening(server.app()) as url:
        stats = run(url, empty, ask, adapters="{name}")
    assert (stats["running"], stats["waiting"], stats["adapters"]) == (0, 0, [])


def test_closing_the_engine_ends_its_requests(empty):
    async def ask(engine):
        answer = engine.submit(request())
        await anext(answer)
        await engine.close()
        with pytest.raises(LmrayError, match="is closed"):
            await anext(answer)
        with pytest.raises(LmrayError, match="is closed"):
            await events(engine, request())
        with pytest.raises(LmrayError, match="is closed"):
            await engine.add_adapter("a", empty)
        return engine.stats()

    with listening(Scripted(chunk(token_ids=[70]), hangs=True).app()) as url:
        assert "is closed" in run(url, empty, ask)["failure"]


def test_an_id_that_runs_already_is_refused(empty):
    async def ask(engine):
        async with aclosing(engine.submit(request())) as answer:
            await anext(answer)
            with pytest.raises(DataError, match="is running already"):
                await events(engine, request())

    with listening(Scripted(chunk(token_ids=[70]), hangs=True).app()) as url:
        run(url, empty, ask)


REFUSALS = {
    400: (DataError, "refused the request: no such field"),
    401: (RemoteError, "HTTP 401: no such field\n  hint: set `engine.api_key_file`"),
    404: (ArtifactError, "does not know what it was asked for: no such field"),
    429: (CapacityError, "is busy: no such field"),
    500: (RemoteError, "HTTP 500: no such field"),
    503: (CapacityError, "is busy: no such field"),
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("status", REFUSALS)
def test_what_a_server_says_instead_of_an_answer_is_told(empty, status, streamed):
    kind, found = REFUSALS[status]
    said = json.dumps({"error": {"message": "no such field", "code": status}})
    server = Scripted(f"data: {said}\n\n") if streamed else Scripted(said, status=status)
    with listening(server.app()) as url, pytest.raises(kind) as caught:
        run(url, empty, lambda engine: events(engine, request()))
    assert found in str(caught.value)


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        ((), "the answer broke off"),
        ((chunk(token_ids=[70]),), "the answer broke off"),
        ((chunk(token_ids=[70]), "data: [DONE]\n\n"), "the answer broke off"),
        ((chunk(text="hello"),), "the server tells no ids of tokens"),
        ((chunk(token_ids=[70], finish_reason="abort"),), "the server ended an answer with `abort`"),
        (("data: {\n\n",), "answers something else than OpenAI's protocol"),
        (("data: {}\n\n",), "answers something else than OpenAI's protocol"),
        (('data: {"choices": [7]}\n\n',), "answers something else than OpenAI's protocol"),
        (('data: {"error": "gone"}\n\n',), "HTTP 500: gone"),
    ],
)
def test_answers_that_are_none_end_the_request_and_no_other(empty, parts, found):
    async def ask(engine):
        with pytest.raises(RemoteError) as caught:
            await events(engine, request())
        return str(caught.value), engine.stats()

    with listening(Scripted(*parts).app()) as url:
        said, stats = run(url, empty, ask)
    assert found in said
    assert (stats["running"], stats["waiting"], stats["failure"]) == (0, 0, None)


def test_an_answer_arrives_whole_however_it_is_cut(empty):
    text = chunk(token_ids=[70, 71], text="a\u2028b\x85c") + chunk(token_ids=[72], finish_reason="length")
    text = text.replace("\\u2028", "\u2028").replace("\\x85", "\x85")
    with listening(Scripted(*text, "data: [DONE]\n\n").app()) as url:
        found = run(url, empty, lambda engine: events(engine, request()))
    assert [(one.token_id, one.finish_reason) for one in found] == [(70, None), (71, None), (72, "length")]


def test_a_token_that_the_server_stops_at_by_itself_is_not_told(empty):
    parts = chunk(token_ids=[70]), chunk(token_ids=[99], finish_reason="stop", stop_reason=99)
    with listening(Scripted(*parts).app()) as url:
        found = run(url, empty, lambda engine: events(engine, request()))
    assert [(one.token_id, one.finish_reason) for one in found] == [(70, None), (None, "stop")]


def test_a_server_that_went_away_is_told(empty):
    with listening(Scripted().app()) as url:
        engine = Running(url, empty).engine

    async def ask():
        async with aclosing(engine.submit(request())) as answer:
            with pytest.raises(RemoteError, match="does not answer"):
                await anext(answer)
        with pytest.raises(RemoteError, match="does not answer"):
            await engine._server.models()
        await engine.close()

    asyncio.run(ask())
    with pytest.raises(RemoteError, match="does not answer"):
        Running(url, empty)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"model": "lmray-bas"}, "has no `lmray-bas`\n  allowed: lmray-base"),
        ({"url": "127.0.0.1:1"}, "is no address"),
        ({"api_key_file": "/nowhere"}, "/nowhere cannot be read"),
        ({"tokens": "text"}, "does not write a text piece by piece"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(vllm, empty, changes, found):
    config = Openai(**{"url": vllm[1], "model": NAME, **changes})
    with pytest.raises(ConfigError) as caught:
        config.start(empty, stop_token_ids=STOP, threads=1)
    assert found in str(caught.value)


def test_the_key_is_read_from_its_file(model_folder, empty, tmp_path):
    key = tmp_path / "key"
    with listening(VllmServer(model_folder, STOP, key="secret").app()) as url:
        with pytest.raises(RemoteError, match="HTTP 401: Unauthorized"):
            Running(url, empty)
        key.write_text("two words")
        with pytest.raises(ConfigError, match="holds no key"):
            Running(url, empty, api_key_file=str(key))
        key.write_text("secret\n")
        assert run(url, empty, lambda engine: events(engine, request()), api_key_file=str(key))


def test_the_figures_of_a_server_are_told_once_they_are_known(vllm, empty):
    async def ask(engine):
        answer = await events(engine, request())
        assert "server" not in engine.stats()
        await engine._asking
        return len(answer), engine.stats()["server"]

    num_events, found = run(vllm[1], empty, ask)
    assert found["running"] == 0.0 and found["generated_tokens"] >= num_events - 1 > 0


@pytest.mark.parametrize("page", ["no page", "# TYPE {"])
def test_a_server_without_such_figures_has_none(empty, page):
    server = Scripted()
    app = server.app()
    app.add_api_route("/metrics", lambda: Response(page), methods=["GET"])

    async def ask(engine):
        engine.stats()
        await engine._asking
        return engine.stats()

    with listening(app) as url:
        assert "server" not in run(url, empty, ask)
