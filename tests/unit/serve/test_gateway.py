"""The gateway over a fake backend: OpenAI's protocol, its errors, keys, limits and clients that leave."""

from __future__ import annotations

import asyncio
import json

import pytest
from openai.pagination import SyncPage
from openai.types import Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from lmray.config.endpoint import HttpLimits
from lmray.engines.base import Sampling
from lmray.errors import ArtifactError, CapacityError, DataError, LmrayError, RemoteError
from lmray.serve import guided
from lmray.serve.gateway import GatewaySettings, make_app
from lmray.serve.keys import read_keys
from tests.unit.serve.asgi import post
from tests.unit.serve.conftest import MAX_LENGTH
from tests.unit.serve.fakes import FakeBackend

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}

STRING_TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "string"}}}
OTHER = {"type": "function", "function": {"name": "wether"}}


def called(arguments: str) -> dict:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


CALLED, MISCALLED = called('{"city": "大阪"}'), called("[1]")


def sse(text: str) -> list:
    """The events of a stream, decoded."""
    lines = [block.removeprefix("data: ") for block in text.split("\n\n") if block]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def text_of(events: list) -> str:
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1] if event["choices"])


def test_a_whole_answer_has_openais_shape(chat, ids):
    backend = FakeBackend(ids("日本語🙂"))
    response = chat(backend)
    body = response.json()
    assert response.status_code == 200
    assert body["id"] == backend.requests[0].id
    assert (body["object"], body["model"]) == ("chat.completion", "tiny")
    assert body["choices"][0]["message"]["content"] == "日本語🙂"
    assert body["choices"][0]["finish_reason"] == "stop"
    num_prompt = len(backend.requests[0].prompt_ids)
    assert body["usage"] == {"prompt_tokens": num_prompt, "completion_tokens": 13, "total_tokens": num_prompt + 13}
    ChatCompletion.model_validate(body)


def test_a_streamed_answer_is_role_text_reason_and_done(chat, ids):
    response = chat(FakeBackend(ids("é🙂")), stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = sse(response.text)
    assert events[-1] == "[DONE]"
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [event["choices"][0]["delta"].get("content") for event in events[1:-2]] == ["é", "🙂"]
    assert events[-2]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert len({event["id"] for event in events[:-1]}) == 1
    for event in events[:-1]:
        ChatCompletionChunk.model_validate(event)


def test_usage_is_streamed_last_where_it_is_asked_for(chat, ids):
    events = sse(chat(FakeBackend(ids("abc")), stream=True, stream_options={"include_usage": True}).text)
    assert events[-2]["choices"] == []
    assert events[-2]["usage"]["completion_tokens"] == 3
    assert all(event["usage"] is None for event in events[:-2])


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_answer_and_the_request(chat, ids, stream):
    backend = FakeBackend(ids("one. Two. Three"))
    response = chat(backend, stop=["nothing", ". T"], stream=stream)
    if stream:
        events = sse(response.text)
        found, reason = text_of(events), events[-2]["choices"][0]["finish_reason"]
    else:
        found, reason = (response.json()["choices"][0][key] for key in ("message", "finish_reason"))
        found = found["content"]
    assert (found, reason) == ("one", "stop")
    assert backend.closed == [backend.requests[0].id]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_cut_by_length_says_so_and_sends_what_it_held_back(chat, ids, stream):
    response = chat(FakeBackend(ids("abEN"), finish_reason="length"), stop="END", stream=stream)
    if stream:
        events = sse(response.text)
        assert (text_of(events), events[-2]["choices"][0]["finish_reason"]) == ("abEN", "length")
    else:
        choice = response.json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("abEN", "length")


def test_sampling_reaches_the_engine_and_defaults_are_openais(chat, tokenizer):
    backend = FakeBackend()
    told = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 3, "repetition_penalty": 1.1}
    told |= {"frequency_penalty": 0.2, "presence_penalty": -0.3}
    chat(backend, **told, max_completion_tokens=5, logit_bias={"7": -100, "5": 2}, logprobs=True, top_logprobs=4)
    chat(backend)
    expected = Sampling(5, **told, logit_bias=((5, 2.0), (7, -100.0)), logprobs=4)
    assert backend.requests[0].sampling == expected
    room = MAX_LENGTH - len(backend.requests[1].prompt_ids)
    assert backend.requests[1].sampling == Sampling(room, temperature=1.0)
    prompt = tokenizer.decode(list(backend.requests[0].prompt_ids))
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_content_may_be_text_parts(chat, tokenizer):
    backend = FakeBackend()
    parts = [{"type": "text", "text": "日"}, {"type": "text", "text": "本"}]
    chat(backend, messages=[{"role": "system", "content": "s"}, {"role": "user", "content": parts}])
    assert "user\n日本<|im_end|>" in tokenizer.decode(list(backend.requests[0].prompt_ids))


@pytest.mark.parametrize(("name", "adapter"), [("tiny", None), ("helper", "helper"), ("tiny:helper", "helper")])
def test_a_model_is_the_base_or_an_adapter_by_either_name(chat, name, adapter):
    backend = FakeBackend()
    assert chat(backend, model=name).json()["model"] == name
    assert backend.requests[0].adapter == adapter


def test_models_are_listed_and_described(call):
    listed = call(FakeBackend(), "GET", "/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["tiny", "helper", "tiny:helper"]
    SyncPage[Model].model_validate(listed)
    assert call(FakeBackend(), "GET", "/v1/models/tiny:helper").json()["parent"] == "tiny"
    assert call(FakeBackend(), "GET", "/v1/models/other").status_code == 404


def test_an_unknown_model_is_told_which_there_are(chat):
    response = chat(FakeBackend(), model="helpr")
    assert response.status_code == 404
    assert response.json()["error"] == {
        "message": "unknown model `helpr`; there are: tiny, helper, tiny:helper; did you mean `helper`?",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


@pytest.mark.parametrize(
    ("fields", "param", "found"),
    [
        ({"temprature": 1}, "temprature", "unknown field\n  allowed: "),
        ({"temprature": 1}, "temprature", "hint: did you mean `temperature`?"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 129}, "n", "less than or equal to 128"),
        ({"best_of": 2}, "best_of", "2 is not supported\n  allowed: 1, or leave it out"),
        ({"echo": True}, "echo", "unknown field"),
        ({"top_logprobs": 2}, "top_logprobs", "is given without `logprobs`"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "Field required"),
        ({"tool_choice": "any"}, "tool_choice", "'none', 'auto' or 'required'"),
        ({"tool_choice": "required"}, "tool_choice", "is `required` without `tools`"),
        ({"tools": [TOOL], "tool_choice": OTHER}, "tool_choice", "not in `tools`\n  allowed: weather"),
        ({"tools": [TOOL, TOOL]}, "tools", "two functions have one name"),
        ({"tools": [STRING_TOOL]}, "tools.0.function.parameters", "no schema of an object"),
        ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format", "leaves no room for a call"),
        ({"tools": [TOOL]}, "tools", "chat template has no place for them"),
        ({"messages": [CALLED]}, "messages", "no place for `tool_calls`"),
        ({"messages": [{**CALLED, "role": "user"}]}, "messages.0", "are the assistant's"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "messages.0", "belongs to role `tool`"),
        ({"messages": [{"role": "user"}]}, "messages.0", "content is missing"),
        ({"messages": [MISCALLED]}, "messages.0.tool_calls.0.function.arguments", "no JSON object"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'json_object' or 'json_schema'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "and that needs it"),
        ({"frequency_penalty": 2.5}, "frequency_penalty", "less than or equal to 2"),
        ({"presence_penalty": -2.5}, "presence_penalty", "greater than or equal to -2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than or equal to 0.01"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty", "greater than or equal to 0.01"),
        ({"temperature": 1e-310}, "temperature", "0, or 0.0001 or more"),
        ({"min_p": 2}, "min_p", "less than or equal to 1"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "valid integer"),
        ({"logit_bias": dict.fromkeys(map(str, range(301)), 1)}, "logit_bias", "at most 300 items"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "less than or equal to 100"),
        ({"seed": "a"}, "seed", "valid integer"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens", "means the same as"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "without `stream`"),
        ({"stop": list("abcde")}, "stop", "at most 4 items"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": None}, "messages", "Field required"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "'assistant' or 'tool'"),
        ({"messages": [{"role": "user", "content": "x", "audio": "y"}]}, "messages.0.audio", "not permitted"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.", "'text'"),
        ({"messages": [{"role": "user", "content": "x" * MAX_LENGTH}]}, "messages", "the messages are 275 tokens"),
    ],
)
def test_what_would_change_the_answer_is_refused_not_ignored(chat, fields, param, found):
    backend = FakeBackend()
    response = chat(backend, **fields)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(param)
    assert found in error["message"]
    assert backend.requests == []


def test_fields_that_change_nothing_are_accepted(chat):
    fields = {
        "n": 1,
        "best_of": 1,
        "user": "someone",
        "metadata": {"a": "b"},
        "modalities": ["text"],
        "an_unknown_one": None,
        "logprobs": False,
        "tools": [],
        "logit_bias": None,
    }
    assert chat(FakeBackend(), **fields, response_format={"type": "text"}).status_code == 200


def test_messages_that_the_template_refuses_are_a_bad_request(call, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    response = call(FakeBackend(), "POST", "/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert "the model's chat template refuses them: roles must alternate" in response.json()["error"]["message"]


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"", b"[" * 100_000, b'{"model": "\\ud800"}'])
def test_a_body_that_is_no_json_object_is_a_bad_request(call, content):
    response = call(FakeBackend(), "POST", "/v1/chat/completions", content=content)
    assert response.status_code == 400
    assert "the body is not" in response.json()["error"]["message"]


def test_a_body_that_is_too_long_is_not_read_to_its_end(call):
    async def body():
        yield b"x" * 90
        yield b"x" * 90
        raise AssertionError("read further than allowed")

    told = {"content": body(), "settings": {"limits": HttpLimits(max_body_bytes=100)}}
    response = call(FakeBackend(), "POST", "/v1/chat/completions", **told)
    assert response.status_code == 413
    assert response.json()["error"]["message"] == "the body is longer than 100 bytes"


def test_other_paths_and_methods_are_answered_in_the_same_shape(call):
    assert call(FakeBackend(), "GET", "/v2").json()["error"]["message"] == "GET /v2: Not Found"
    assert call(FakeBackend(), "GET", "/v1/chat/completions").status_code == 405


@pytest.fixture
def keyed(tmp_path) -> dict:
    (tmp_path / "keys").write_text("secret\nother\n")
    return {"settings": {"keys": read_keys(str(tmp_path / "keys"))}}


@pytest.mark.parametrize("header", [None, "Bearer wrong", "secret", "Basic secret", "Bearer", "Bearer sécret"])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny", "/v1/chat/completions"])
def test_without_a_known_key_nothing_is_told(call, keyed, path, header):
    headers = {} if header is None else {"Authorization": header.encode()}
    method = "POST" if path.endswith("completions") else "GET"
    response = call(FakeBackend(), method, path, headers=headers, **keyed)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("key", ["secret", "other"])
def test_any_of_the_keys_lets_in(call, keyed, key):
    assert (
        call(FakeBackend(), "GET", "/v1/models", headers={"Authorization": f"Bearer {key}"}, **keyed).status_code == 200
    )


def test_health_and_readiness_ask_for_no_key_and_tell_no_lies(call, keyed):
    assert call(FakeBackend(), "GET", "/health", **keyed).status_code == 200
    assert call(FakeBackend(), "GET", "/ready", **keyed).json()["status"] == "ready"
    down = FakeBackend()
    down.down = RemoteError("endpoint", "no replica answered")
    assert call(down, "GET", "/health", **keyed).status_code == 200
    assert call(down, "GET", "/ready", **keyed).status_code == 503


def test_no_other_origin_is_let_in(call):
    headers = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    response = call(FakeBackend(), "OPTIONS", "/v1/chat/completions", headers=headers)
    assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (DataError("request", "is odd"), 400, "invalid_request_error"),
        (ArtifactError("request", "unknown adapter"), 404, "invalid_request_error"),
        (CapacityError("endpoint", "too many requests are waiting"), 429, "rate_limit_error"),
        (RemoteError("endpoint", "no replica answered"), 503, "server_error"),
        (LmrayError("engine", "a step failed"), 500, "server_error"),
    ],
)
def test_failures_before_the_first_token_are_statuses(chat, stream, error, status, kind):
    response = chat(FakeBackend(error=error), stream=stream)
    assert response.status_code == status
    assert response.json()["error"]["type"] == kind
    assert error.found in response.json()["error"]["message"]
    assert ("retry-after" in response.headers) == (status in (429, 503))


def test_a_failure_on_the_way_is_an_event_and_no_done(chat, ids):
    events = sse(chat(FakeBackend(ids("abcd"), error=LmrayError("engine", "broke"), fails_after=2), stream=True).text)
    assert text_of(events) == "ab"
    assert events[-1]["error"]["message"] == "broke"


def test_an_answer_without_an_end_is_a_failure(chat):
    response = chat(FakeBackend(finish_reason="length"))
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "the answer broke off"


def test_json_needs_the_library_that_reads_schemas(chat, monkeypatch):
    monkeypatch.setattr(guided, "find_spec", lambda name: None)
    response = chat(FakeBackend(), response_format={"type": "json_object"})
    assert response.status_code == 400
    assert "hint: install `lmray[guided]` where it runs" in response.json()["error"]["message"]


def test_json_reaches_the_engine_as_a_grammar(chat):
    pytest.importorskip("llguidance")
    backend = FakeBackend()
    schema = {"enum": ["大阪", 1]}
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}}
    assert chat(backend, response_format=form).status_code == 200
    [grammar] = json.loads(backend.requests[0].sampling.grammar or "")["grammars"]
    assert grammar["json_schema"]["enum"] == schema["enum"]


def test_a_bug_is_told_in_one_word_only(chat):
    class Broken(FakeBackend):
        async def adapters(self):
            raise ZeroDivisionError("a detail of ours")

    response = chat(Broken())
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "internal error"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hangs_after", [0, 2])
def test_a_client_that_leaves_closes_its_request(tokenizer, ids, stream, hangs_after):
    """Plain ASGI, so that the moment of leaving is ours: the backend hangs, the client goes, the request must end."""

    async def main() -> FakeBackend:
        backend = FakeBackend(ids("abcd"))
        backend.hangs_after = hangs_after
        app = make_app(backend, tokenizer, GatewaySettings("tiny", MAX_LENGTH))
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": stream}
        await post(app, "/v1/chat/completions", body, gone=backend.hanging)
        return backend

    backend = asyncio.run(main())
    assert backend.closed == [backend.requests[0].id]
