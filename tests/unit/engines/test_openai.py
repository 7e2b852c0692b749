"""Engines behind HTTP: what is asked, what comes back, and what happens when a server does not behave."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import aclosing, contextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import ValidationError

from lmray.engines.base import Request as EngineRequest
from lmray.engines.base import Sampling, TokenEvent
from lmray.engines.native import Native
from lmray.engines.openai import Openai
from lmray.errors import ArtifactError, CapacityError, ConfigError, DataError, LmrayError, RemoteError
from lmray.models.load import load_empty_model, load_model, load_tokenizer
from lmray.serve.gateway import GatewaySettings, make_app
from lmray.serve.guided import JsonSchema, ResponseFormat, grammar_of
from tests.unit.engines.conftest import NUM_NEW, STOP
from tests.unit.engines.vllm_server import NAME, VllmServer, listening

MAX_LENGTH = 128


@pytest.fixture
def empty(model_folder):
    return load_empty_model(model_folder, dtype="float32")


@pytest.fixture(scope="module")
def vllm(model_folder):
    """The server and its address."""
    server = VllmServer(model_folder, STOP)
    with listening(server.app()) as url:
        yield server, url


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


SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": 7},
    "penalised": {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2},
    "biased": {"logit_bias": ((70, 30.0), (71, -5.0))},
    "stopped": {"logit_bias": ((STOP[0], 100.0),), "logprobs": 1},
    "told": {"logprobs": 3},
    "told alone": {"logprobs": 0},
    "read": {"prompt_logprobs": 2, "logprobs": 1, "max_tokens": 3},
    "only read": {"prompt_logprobs": 0, "max_tokens": 0},
    "one": {"max_tokens": 1},
}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_every_way_to_draw_gives_the_events_of_the_embedded_engine(vllm, empty, model, prompts, sampling):
    native = Native(max_batch_size=4, max_length=MAX_LENGTH).start(model, stop_token_ids=STOP, threads=1)

    async def ask_native():
        try:
            return [await events(native, request(prompt, **sampling)) for prompt in prompts]
        finally:
            await native.close()

    async def ask(engine):
        return [await events(engine, request(prompt, **sampling)) for prompt in prompts]

    wanted = asyncio.run(ask_native())
    for got, own in zip(run(vllm[1], empty, ask), wanted, strict=True):
        assert [plain(event) for event in got] == [plain(event) for event in own]
        assert [numbers(event) for event in got] == [pytest.approx(numbers(event), abs=1e-4) for event in own]


def plain(event: TokenEvent) -> tuple[Any, ...]:
    """An event without its numbers."""
    told = [event.logprob, *(event.prompt_logprobs or ())]
    tokens = [one and (one.token_id, [token for token, _ in one.top]) for one in told]
    return event.token_id, event.finish_reason, event.prompt_logprobs is None, tokens


def numbers(event: TokenEvent) -> list[float]:
    told = [one for one in (event.logprob, *(event.prompt_logprobs or ())) if one is not None]
    return [value for one in told for value in (one.logprob, *(logprob for _, logprob in one.top))]


def test_all_that_a_server_could_have_a_default_for_is_told(vllm, empty):
    server, url = vllm
    run(url, empty, lambda engine: events(engine, request()))
    assert server.bodies[-1] == {
        "model": NAME, "prompt": [5, 6, 7], "max_tokens": NUM_NEW, "temperature": 0.0, "top_p": 1.0, "top_k": 0,
        "min_p": 0.0, "repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0, "stream": True,
        "stop_token_ids": list(STOP), "return_token_ids": True, "cache_salt": "salt",
    }  # fmt: skip


def test_json_schemas_are_told_by_vllms_name_and_other_grammars_refused(empty):
    server = Scripted(chunk(token_ids=[70], finish_reason="length"))
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    wanted = ResponseFormat(type="json_schema", json_schema=JsonSchema(name="place", schema=schema))

    async def ask(engine):
        await events(engine, request(grammar=grammar_of(wanted)))
        for grammar in ('start: "a"', "[]", '{"grammars": [{"lark_grammar": "start: \'a\'"}]}'):
            with pytest.raises(DataError, match="this grammar is none"):
                await events(engine, request(grammar=grammar))

    with listening(server.app()) as url:
        run(url, empty, ask)
    assert server.bodies[-1]["structured_outputs"] == {"json": schema} and len(server.bodies) == 1


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


@pytest.mark.parametrize(
    ("template", "found"), [("helper", "names every adapter alike"), ("{nam}", "cannot be filled in"), ("{", "cannot")]
)
def test_templates_that_name_no_adapter_are_refused(template, found):
    with pytest.raises(ValidationError, match=found):
        Openai(url="http://x", model="m", adapters=template)


def test_adapters_come_by_path_and_go_when_their_last_request_is_done(vllm, empty, adapter_folders, prompts, expected):
    server, url = vllm

    async def ask(engine):
        await engine.add_adapter("a@1", adapter_folders["a"])
        answer = engine.submit(request(prompts[0], "long", "a@1"))
        got = [(await anext(answer)).token_id]
        leaving = asyncio.ensure_future(engine.remove_adapter("a@1"))
        await asyncio.sleep(0)
        with pytest.raises(ArtifactError, match="unknown adapter `a@1`"):
            await events(engine, request(adapter="a@1", name="late"))
        with pytest.raises(ArtifactError, match="is not loaded"):
            await engine.remove_adapter("a@1")
        with pytest.raises(ArtifactError, match="is loaded already"):
            await engine.add_adapter("a@1", adapter_folders["a"])
        assert "a@1" in server.adapters
        got += [event.token_id async for event in answer if event.token_id is not None]
        await leaving
        return got

    assert run(url, empty, ask) == expected["a"][0]
    assert server.adapters == {}


def test_an_adapter_that_the_server_forgot_is_loaded_again(vllm, empty, adapter_folders, prompts, expected):
    server, url = vllm

    async def ask(engine):
        await engine.add_adapter("a", adapter_folders["a"])
        async with httpx.AsyncClient() as client:
            await client.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": "a"})
        assert "a" not in server.adapters
        answer = await events(engine, request(prompts[0], adapter="a"))
        await engine.remove_adapter("a")
        return [event.token_id for event in answer if event.token_id is not None]

    assert run(url, empty, ask) == expected["a"][0]


def test_adapters_that_cannot_be_served_are_refused(vllm, empty, adapter_folders, model_folder):
    server, url = vllm

    async def ask(engine):
        with pytest.raises(ArtifactError, match=r"adapter_config.json"):
            await engine.add_adapter("a", model_folder)
        await engine.add_adapter("a", adapter_folders["a"])
        with pytest.raises(CapacityError, match="1 adapters are loaded already"):
            await engine.add_adapter("b", adapter_folders["b"])
        await engine.remove_adapter("a")
        server.adapters["b"] = "another place"
        with pytest.raises(ArtifactError, match="has already been loaded"):
            await engine.add_adapter("b", adapter_folders["b"])
        server.adapters["b"] = str(adapter_folders["b"])
        await engine.add_adapter("b", adapter_folders["b"])  # by a process before this one
        del server.adapters["b"]
        await engine.remove_adapter("b")
        return engine.stats()["adapters"]

    assert run(url, empty, ask, max_adapters=1) == []


def test_a_server_that_loads_no_adapters_is_told_apart(model_folder, empty, adapter_folders):
    def ask(engine):
        return engine.add_adapter("a", adapter_folders["a"])

    server = VllmServer(model_folder, STOP, loads=False)
    with listening(server.app()) as url, pytest.raises(ArtifactError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        run(url, empty, ask)


def test_adapters_that_a_server_has_by_itself_go_by_their_names(empty, adapter_folders):
    server = Scripted(chunk(token_ids=[70], finish_reason="length"))

    async def ask(engine):
        with pytest.raises(ArtifactError, match="the server has no model `other`\n  allowed: helper, lmray-base"):
            await engine.add_adapter("other@1", adapter_folders["a"])
        await engine.add_adapter("helper@1", adapter_folders["a"])
        await events(engine, request(adapter="helper@1"))
        await engine.remove_adapter("helper@1")

    with listening(server.app()) as url:
        run(url, empty, ask, adapters="{name}")
    assert server.bodies[-1]["model"] == "helper"


def test_the_figures_of_a_server_are_told_once_they_are_known(vllm, empty):
    async def ask(engine):
        assert "server" not in engine.stats()
        await engine._asking
        return engine.stats()["server"]

    found = run(vllm[1], empty, ask)
    assert found["running"] == 0.0 and found["generated_tokens"] > 0.0


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


@contextmanager
def gateway(model_folder):
    """lmray's own endpoint over the embedded engine."""
    tokenizer = load_tokenizer(model_folder)
    config = Native(max_batch_size=4, max_length=MAX_LENGTH)
    native = config.start(load_model(model_folder, "float32"), stop_token_ids=STOP, threads=1, tokenizer=tokenizer)

    class Backend:
        stream = staticmethod(native.submit)

        async def adapters(self):
            return ()

    with listening(make_app(Backend(), tokenizer, GatewaySettings(NAME, MAX_LENGTH))) as url:
        yield url
    asyncio.run(native.close())


def test_a_server_that_tells_text_alone_gives_the_same_text(model_folder, empty, model, prompts):
    tokenizer = load_tokenizer(model_folder)
    biases = tuple((token, 50.0 * (token % 3)) for token in range(68, 130))  # letters, else bytes that are no text
    asked = [request(prompt, logit_bias=biases, max_tokens=12, repetition_penalty=1.5) for prompt in prompts]
    native = Native(max_length=MAX_LENGTH).start(model, stop_token_ids=STOP, threads=1)

    async def ask_native():
        try:
            return [await events(native, one) for one in asked]
        finally:
            await native.close()

    def said(found: list[TokenEvent]) -> str:
        return str(tokenizer.decode([event.token_id for event in found if event.token_id is not None]))

    async def ask(engine):
        with pytest.raises(DataError, match="log probabilities are not told by text alone"):
            await events(engine, request(logprobs=1))
        assert not engine.capabilities.exact_tokens
        return [await events(engine, one) for one in asked]

    wanted = asyncio.run(ask_native())
    with gateway(model_folder) as url:
        found = run(f"{url}/v1/", empty, ask, tokenizer, tokens="text")
    assert [said(one) for one in found] == [said(one) for one in wanted]
    assert len({said(one) for one in wanted}) > 1
    assert [one[-1].finish_reason for one in found] == [one[-1].finish_reason for one in wanted]


def test_a_job_is_checked_without_the_server(empty, adapter_folders, model_folder):
    config = Openai(url="http://nowhere", model="m", max_length=512)
    config.check(empty, adapter_folders)
    with pytest.raises(ArtifactError, match="cannot be read"):
        config.check(empty, {"model": model_folder})
    with pytest.raises(ConfigError, match="more than LlamaForCausalLM has positions for"):
        Openai(url="http://nowhere", model="m", max_length=4096).check(empty, {})
