"""Tools through OpenAI's own client, over the embedded engine: calls that are made, held to a schema, and answered."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from lmray.models.load import load_tokenizer
from lmray.serve.gateway import GatewaySettings, make_app
from lmray.testing.listening import listening
from lmray.testing.tiny import tiny_model_folder
from tests.unit.serve.fakes import FakeBackend
from tests.unit.serve.servers import MAX_LENGTH, EngineBackend
from tests.unit.serve.test_tools import CALL, LLAMA, MISTRAL, TEMPLATE

pytest.importorskip("llguidance")
MESSAGES: Any = [{"role": "developer", "content": "短く"}, {"role": "user", "content": "大阪の天気は？"}]
CITY = {"type": "string", "enum": ["大阪", "東京"]}


class Weather(BaseModel):
    """Tells the weather."""

    city: Literal["大阪", "東京"]
    days: Literal[1, 2]


def tool(name: str, **fields: Any) -> Any:
    parameters = {"type": "object", "properties": {"city": CITY}, "required": ["city"], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "parameters": parameters, **fields}}


@pytest.fixture(scope="module", params=[TEMPLATE, LLAMA, MISTRAL], ids=["tagged", "llama", "mistral"])
def folder(request, tmp_path_factory):
    folder = tiny_model_folder(tmp_path_factory.mktemp("tools") / "tiny")
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = request.param
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def client(folder) -> Iterator[openai.OpenAI]:
    backend = EngineBackend(folder)
    app = make_app(backend, load_tokenizer(folder), GatewaySettings("tiny", MAX_LENGTH))
    try:
        with listening(app, path="/v1") as url, openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            yield client
    finally:
        asyncio.run(backend.engine.close())


def told(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": MESSAGES, "temperature": 1.0, "max_tokens": 200, **fields}


@pytest.mark.parametrize("seed", range(3))
def test_a_call_that_is_required_is_made_whole_and_streamed_alike(client, seed):
    asked = told(tools=[tool("weather"), tool("climate")], tool_choice="required", parallel_tool_calls=False, seed=seed)
    whole = client.chat.completions.create(**asked).choices[0]
    with client.chat.completions.stream(**asked) as stream:
        streamed = stream.get_final_completion().choices[0]
    called = []
    for choice in (whole, streamed):
        assert choice.finish_reason == "tool_calls" and not choice.message.content
        [call] = choice.message.tool_calls
        assert call.function.name in ("weather", "climate")
        assert json.loads(call.function.arguments)["city"] in CITY["enum"]
        called.append((call.function.name, call.function.arguments))
    assert called[0] == called[1]


def test_a_named_function_is_called_once_and_no_other(client):
    choice: Any = {"type": "function", "function": {"name": "climate"}}
    answer = client.chat.completions.create(**told(tools=[tool("weather"), tool("climate")], tool_choice=choice))
    [call] = answer.choices[0].message.tool_calls
    assert call.function.name == "climate" and answer.choices[0].finish_reason == "tool_calls"


def test_a_strict_function_is_parsed_by_the_client(client):
    choice: Any = {"type": "function", "function": {"name": "Weather"}}
    asked = told(tools=[openai.pydantic_function_tool(Weather)], tool_choice=choice)
    [call] = client.chat.completions.parse(**asked).choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather)


def test_a_strict_function_leaves_room_for_text(client):
    asked = told(tools=[tool("weather", strict=True)], max_tokens=20, logit_bias={"67": 100})
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.message.content == "a" * 20 and choice.message.tool_calls is None


def test_an_answer_is_sent_back_as_it_came_and_goes_on(client):
    asked = told(tools=[tool("weather")], tool_choice="required", parallel_tool_calls=False)
    first = client.chat.completions.create(**asked).choices[0].message
    result: Any = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "晴れ☀️"}
    again = client.chat.completions.create(**{**asked, "messages": [*MESSAGES, first, result], "tool_choice": "none"})
    assert again.choices[0].message.tool_calls is None and again.choices[0].finish_reason in ("stop", "length")


def test_calls_side_by_side_are_one_where_only_one_is_wanted(tokenizer, ids, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    backend = FakeBackend(ids(f"So: {CALL}\n{CALL}\nand more"))
    app = make_app(backend, tokenizer, GatewaySettings("tiny", MAX_LENGTH))
    with listening(app, path="/v1") as url, openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        asked: Any = told(tools=[tool("weather")])
        both = client.chat.completions.create(**asked).choices[0]
        one = client.chat.completions.create(**asked, parallel_tool_calls=False).choices[0]
        chunks = list(client.chat.completions.create(**asked, parallel_tool_calls=False, stream=True))
    assert len(both.message.tool_calls) == 2
    assert (len(one.message.tool_calls), one.message.content, one.finish_reason) == (1, "So:", "tool_calls")
    assert sum(len(chunk.choices[0].delta.tool_calls or ()) for chunk in chunks) == 1
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert len(backend.closed) == 3, "what follows the call was still asked for"


def test_what_is_not_offered_is_not_found_in_openais_shape(client):
    with pytest.raises(openai.NotFoundError) as refused:
        client.embeddings.create(model="tiny", input="x")
    assert refused.value.body == {
        "message": "POST /v1/embeddings: Not Found",
        "type": "invalid_request_error",
        "param": None,
        "code": None,
    }
