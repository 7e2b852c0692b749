"""Engines behind HTTP: what is asked, and what comes back."""

from __future__ import annotations

import asyncio
import shutil
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from lmray.engines.base import TokenEvent
from lmray.engines.native import Native
from lmray.engines.openai import Openai
from lmray.errors import ArtifactError, CapacityError, ConfigError, DataError
from lmray.models.load import load_model, load_tokenizer
from lmray.serve.gateway import GatewaySettings, make_app
from lmray.serve.guided import JsonSchema, ResponseFormat, grammar_of
from lmray.testing.listening import listening
from tests.unit.engines.conftest import NUM_NEW, STOP
from tests.unit.engines.remote import MAX_LENGTH, Scripted, chunk, events, request, run
from tests.unit.engines.vllm_server import NAME, VllmServer

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
    "more than fits": {"max_tokens": MAX_LENGTH - 1},
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
        assert named(server) == ["a@1"]
        got += [event.token_id async for event in answer if event.token_id is not None]
        await leaving
        return got

    assert run(url, empty, ask) == expected["a"][0]
    assert server.adapters == {}


def named(server: VllmServer) -> list[str]:
    """The handles of the adapters there, without what the engine adds to them."""
    return [name.rpartition("-")[0] for name in server.adapters]


def test_a_folder_that_was_trained_into_again_is_another_adapter(
    model_folder, empty, adapter_folders, prompts, expected, tmp_path
):
    folder = tmp_path / "out"

    async def ask(engine):  # and the server keeps it
        await engine.add_adapter(str(folder), folder)
        return [event.token_id for event in await events(engine, request(prompts[0], adapter=str(folder)))]

    found = {}
    with listening(VllmServer(model_folder, STOP).app()) as url:
        for name in ("a", "b"):
            shutil.copytree(adapter_folders[name], folder, dirs_exist_ok=True)
            found[name] = [token_id for token_id in run(url, empty, ask) if token_id is not None]
    assert found == {name: expected[name][0] for name in ("a", "b")}


def test_an_adapter_that_the_server_forgot_is_loaded_again(vllm, empty, adapter_folders, prompts, expected):
    server, url = vllm

    async def ask(engine):
        await engine.add_adapter("a", adapter_folders["a"])
        async with httpx.AsyncClient() as client:
            await client.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": next(iter(server.adapters))})
        assert not server.adapters
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
        await engine.add_adapter("b", adapter_folders["b"])
        (name,) = server.adapters
        await engine.remove_adapter("b")
        server.adapters[name] = "another place"
        with pytest.raises(ArtifactError, match="has already been loaded"):
            await engine.add_adapter("b", adapter_folders["b"])
        server.adapters[name] = str(adapter_folders["b"])
        await engine.add_adapter("b", adapter_folders["b"])  # by a process before this one
        del server.adapters[name]
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
