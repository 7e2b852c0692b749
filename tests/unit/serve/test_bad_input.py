"""Every wrong field, name, schema and text: an answer in OpenAI's shape that says what is wrong, and no word of the
prompt in what is logged or printed."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from lmray.serve.forms import MAX_TOLD
from lmray.serve.gateway import GatewaySettings, make_app
from lmray.serve.openai import MAX_BIASES, MAX_PROBLEMS, ChatRequest
from lmray.serve.openapi import openapi_document
from tests.unit.serve.conftest import MAX_LENGTH
from tests.unit.serve.fakes import FakeBackend
from tests.unit.serve.servers import key

MARKER = "marker-of-a-prompt"
DOCUMENT = openapi_document(version="0", has_keys=False)
SCHEMAS = DOCUMENT["components"]["schemas"]
PATHS = {"/v1/chat/completions": "ChatRequest", "/v1/completions": "CompletionRequest"}
VALID: dict[str, Any] = {
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": MARKER}]},
    "/v1/completions": {"model": "tiny", "prompt": MARKER},
}
SAMPLES: dict[str, Any] = {
    "string": MARKER,
    "integer": 7,
    "number": 0.5,
    "boolean": True,
    "array": [MARKER],
    "object": {MARKER: MARKER},
}
"""A value of each type of JSON."""


def alternatives(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """`schema` as the types that it is any of."""
    if "$ref" in schema:
        schema = SCHEMAS[schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        for one in schema["anyOf"]:
            yield from alternatives(one)
    else:
        yield schema


def wrong_values(schema: dict[str, Any]) -> Iterator[Any]:
    """Values that `schema` does not allow: other types, and just outside each limit."""
    found = list(alternatives(schema))
    types = {one.get("type") or {str: "string", int: "integer"}.get(type(one["enum"][0])) for one in found}
    allowed = types | ({"integer"} if "number" in types else set())
    yield from (value for name, value in SAMPLES.items() if name not in allowed)
    for one in found:
        yield from _outside(one)


def _outside(one: dict[str, Any]) -> Iterator[Any]:
    step = 1 if one.get("type") == "integer" else 1e-6
    for limit, away in (("minimum", -step), ("maximum", step), ("exclusiveMinimum", 0)):
        if limit in one:
            yield one[limit] + away
    if "enum" in one and one.get("type") == "string":
        yield MARKER
    if one.get("minLength"):
        yield ""
    if "maxLength" in one:
        yield "x" * (one["maxLength"] + 1)
    if one.get("minItems"):
        yield []
    if "maxItems" in one:
        yield ["x"] * (one["maxItems"] + 1)
    if "maxProperties" in one:
        yield {str(place): 1 for place in range(one["maxProperties"] + 1)}


def cases() -> Iterator[Any]:
    for path, name in PATHS.items():
        schema = SCHEMAS[name]
        for field, told in schema["properties"].items():
            values = list(wrong_values(told)) if told else []
            for place, value in enumerate(values):
                yield pytest.param(path, field, value, id=f"{name}.{field}-{place}")
        for field in schema["required"]:
            yield pytest.param(path, field, None, id=f"{name}.{field}-missing")
        yield pytest.param(path, "unknown_field", MARKER, id=f"{name}.unknown")


@pytest.fixture(autouse=True)
def _says_nothing_of_prompts(caplog, capfd):
    with caplog.at_level(logging.DEBUG):
        yield
    said = capfd.readouterr()
    own = [record for record in caplog.records if not record.name.startswith(("httpx", "httpcore", "asyncio"))]
    logged = [logging.Formatter().format(record) for record in own]
    assert MARKER not in "\n".join([*logged, said.out, said.err])


def check_refused(response: httpx.Response, *statuses: int) -> dict[str, Any]:
    """The error of `response`, which has OpenAI's shape."""
    assert response.status_code in (statuses or (400,)), response.text[:500]
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and 0 < len(error["message"]) <= 2000
    return error


@pytest.mark.parametrize(("path", "field", "value"), cases())
def test_a_wrong_field_is_named_and_nothing_is_asked(call, path, field, value):
    backend = FakeBackend()
    error = check_refused(call(backend, "POST", path, json={**VALID[path], field: value}), 400, 404)
    assert error["param"].startswith(field)
    assert backend.requests == []


def test_the_table_of_wrong_fields_is_a_table():
    assert len(list(cases())) > 250


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "%2e%2e%2fhelper", "tiny:../helper", "a\x00b", "\n", "", "日本" * 100, "é\u0301\u202e", "@"],
)
def test_a_name_that_is_none_is_unknown_whatever_it_looks_like(call, name):
    for path, body in VALID.items():
        error = check_refused(call(FakeBackend(), "POST", path, json={**body, "model": name}), 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")


@pytest.mark.parametrize("name", ["../helper", "%2e%2e/x", "%2e%2e%2fx", "a%00b", "%ff%fe", "%ed%a0%80", "x" * 5000])
def test_a_path_that_names_no_model_is_not_found(call, name):
    response = call(FakeBackend(), "GET", f"/v1/models/{name}")
    assert response.status_code == 404
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert len(response.text) < 3000


def test_of_many_models_an_error_names_a_few(call):
    names = [f"adapter-{place}" for place in range(1000)]
    error = check_refused(call(FakeBackend(adapters=names), "GET", "/v1/models/adapter-1001"), 404)
    assert "adapter-8, tiny:adapter-8, adapter-9 and 1981 more" in error["message"]


def test_without_the_right_to_an_adapter_nothing_is_told_of_it(call):
    told = {"headers": {"Authorization": "Bearer few"}, "settings": {"keys": (key("few", models=("other",)),)}}
    for path, body in VALID.items():
        response = call(FakeBackend(), "POST", path, json={**body, "model": "helper"}, **told)
        assert check_refused(response, 403)["code"] == "model_not_allowed"


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/completions", {"prompt": MARKER * MAX_LENGTH}, "prompt"),
        ("/v1/completions", {"prompt": [5] * MAX_LENGTH}, "prompt"),
        ("/v1/completions", {"prompt": [10**30]}, "prompt"),
        ("/v1/completions", {"prompt": [[1], [-1]]}, "prompt"),
        ("/v1/completions", {"prompt": [MARKER] * 129}, "prompt"),
        ("/v1/completions", {"prompt": [MARKER], "n": 10**20}, "n"),
        ("/v1/completions", {"prompt": [MARKER] * 2, "n": 100, "max_tokens": 10**9}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": MARKER * MAX_LENGTH}]}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}] * 5000}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [[[]]]}]}, "messages.0.content"),
        ("/v1/chat/completions", {"stop": [MARKER] * 5000}, "stop"),
        ("/v1/chat/completions", {"stop": MARKER * 100}, "stop"),
        ("/v1/chat/completions", {"seed": 10**40}, "seed"),
        ("/v1/chat/completions", {"max_tokens": -(10**30)}, "max_tokens"),
        ("/v1/chat/completions", {"logit_bias": {"-1": 1}}, "logit_bias"),
        ("/v1/chat/completions", {"logit_bias": {MARKER: 1}}, "logit_bias"),
        ("/v1/chat/completions", {"logit_bias": {"5": "x"}}, "logit_bias"),
        ("/v1/chat/completions", {"logit_bias": {"5": 1e300}}, "logit_bias"),
        ("/v1/chat/completions", {"x" * 100_000: 1}, "x"),
        ("/v1/chat/completions", {"tools": [{"type": "function", "function": {"name": ""}}]}, "tools.0.function.name"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_too_much_is_refused(call, path, fields, param):
    backend = FakeBackend()
    error = check_refused(call(backend, "POST", path, json={**VALID[path], **fields}))
    assert error["param"].startswith(param) and len(error["param"]) <= 200
    assert backend.requests == []


MANY = 2000
CALLS = {"role": "assistant", "tool_calls": [0] * MANY}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [0] * MANY}, "messages.0"),
        ({"messages": [{"role": "user", "content": [0] * MANY}]}, "messages.0.content.0"),
        ({"messages": [CALLS]}, "messages.0.tool_calls.0"),
        ({"tools": [0] * 128}, "tools.0"),
    ],
)
def test_of_many_items_that_are_wrong_one_is_looked_at(call, fields, param):
    body = {**VALID["/v1/chat/completions"], **fields}
    with pytest.raises(ValidationError) as found:
        ChatRequest.model_validate_json(json.dumps(body))
    assert found.value.error_count() <= 2  # as a text, and as a list
    assert check_refused(call(FakeBackend(), "POST", "/v1/chat/completions", json=body))["param"] == param


def test_of_too_many_biases_none_is_looked_at(call, monkeypatch):
    monkeypatch.setattr(ChatRequest, "model_validate_json", None)
    body = {**VALID["/v1/chat/completions"], "logit_bias": {f"x{place}": "x" for place in range(MAX_BIASES + 1)}}
    error = check_refused(call(FakeBackend(), "POST", "/v1/chat/completions", json=body))
    assert error["param"] == "logit_bias" and "has 301 items\n  allowed: at most 300 items" in error["message"]


def test_of_too_many_problems_only_their_number_is_told(call):
    options = {f"x{place}": 0 for place in range(MAX_PROBLEMS + 1)}
    body = {**VALID["/v1/chat/completions"], "stream": True, "stream_options": options}
    error = check_refused(call(FakeBackend(), "POST", "/v1/chat/completions", json=body))
    assert error["param"] is None and "1001 things are wrong in the body" in error["message"]


def test_more_log_probabilities_than_a_gateway_can_hold_are_refused(tokenizer, monkeypatch):
    app = make_app(backend := FakeBackend(), tokenizer, GatewaySettings("tiny", 10_000))
    body = {**VALID["/v1/chat/completions"], "n": 128, "logprobs": True, "top_logprobs": 20}
    error = check_refused(asyncio.run(post(app, json.dumps(body).encode())))
    assert error["param"] == "logprobs" and f"allowed: up to {MAX_TOLD}" in error["message"]
    assert backend.requests == []


async def post(app, content: bytes, path: str = "/v1/chat/completions") -> httpx.Response:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        return await client.post(path, content=content)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


SCHEMAS_THAT_ARE_NONE: dict[str, Any] = {
    "type": {"type": "strnig"},
    "properties": {"properties": 5},
    "required": {"type": "object", "required": "a"},
    "keyword": {"type": "object", "if": {}, "then": {}},
    "format": {"type": "string", "format": "nonsense"},
    "remote": {"$ref": "http://example.org/schema"},
    "file": {"$ref": "file:" + "///etc/passwd"},
    "missing": {"$ref": "#/$defs/none"},
    "pattern": {"type": "string", "pattern": "("},
    "deep": nested(120),
    "deeper": nested(400),
    "huge": {
        "type": "object",
        "properties": {f"p{n}": {"type": "string", "pattern": "[a-z]{9}"} for n in range(15_000)},
    },
    "number": {"type": "integer", "minimum": -(10**400)},
    "patterns": {"allOf": [{"type": "string", "pattern": f"(.*a){{{n}}}"} for n in range(1, 30)]},
    "patterns by name": {
        "$ref": "#/$defs/d0",
        "$defs": {f"d{n}": {"$ref": f"#/$defs/d{n + 1}", "pattern": f"(.*a){{{n}}}"} for n in range(30)},
    },
}


@pytest.mark.parametrize("name", SCHEMAS_THAT_ARE_NONE)
def test_a_schema_that_is_none_is_refused_for_answers_and_for_tools(call, tokenizer, monkeypatch, name):
    pytest.importorskip("llguidance")
    schema = SCHEMAS_THAT_ARE_NONE[name]
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": schema}}, "strict": True}
    tools = {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    for fields, param in (({"response_format": form}, "response_format"), (tools, "tools")):
        body = {**VALID["/v1/chat/completions"], **fields}
        error = check_refused(call(FakeBackend(), "POST", "/v1/chat/completions", json=body))
        assert error["param"] is None or error["param"].startswith(param)


LOOPS: dict[str, Any] = {
    "itself": {"$ref": "#"},
    "a circle": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    "all of itself": {"allOf": [{"$ref": "#"}]},
    "any of itself": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    "a list": {"type": "object", "properties": {"next": {"$ref": "#"}}},
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_schema_that_names_itself_ends(call, name):
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": LOOPS[name]}}
    body = {**VALID["/v1/chat/completions"], "response_format": form}
    assert call(FakeBackend(), "POST", "/v1/chat/completions", json=body).status_code in (200, 400)


def test_patterns_that_are_merged_with_nothing_may_be_many(call):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {f"p{n}": {"type": "string", "pattern": "[a-z]+"} for n in range(50)}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {**VALID["/v1/chat/completions"], "response_format": form}
    assert call(FakeBackend(), "POST", "/v1/chat/completions", json=body).status_code == 200


def test_a_tokenizer_that_fails_is_our_failure_and_is_told_without_the_text(tokenizer, call, monkeypatch):
    def fail(text: str, **options: Any):
        raise ValueError(f"cannot read {text}")

    app = make_app(FakeBackend(), tokenizer, GatewaySettings("tiny", MAX_LENGTH))
    monkeypatch.setattr(type(tokenizer), "__call__", lambda self, text, **options: fail(text))
    response = asyncio.run(post(app, json.dumps(VALID["/v1/completions"]).encode(), "/v1/completions"))
    assert response.status_code == 500
    assert response.json()["error"] == {
        "message": "internal error",
        "type": "server_error",
        "param": None,
        "code": None,
    }


@pytest.mark.parametrize("stream", [False, True])
def test_a_decoder_that_fails_on_the_way_ends_the_answer_without_the_text(tokenizer, ids, monkeypatch, stream):
    app = make_app(FakeBackend(ids("abc")), tokenizer, GatewaySettings("tiny", MAX_LENGTH))
    said: list[Any] = []

    def fail(self, token_ids, **options):
        said.append(token_ids)
        if len(said) > 1:
            raise ValueError(MARKER)
        return "a"

    monkeypatch.setattr(type(tokenizer), "decode", fail)
    body = {**VALID["/v1/chat/completions"], "stream": stream}
    response = asyncio.run(post(app, json.dumps(body).encode()))
    assert response.status_code == (200 if stream else 500)
    assert "internal error" in response.text and MARKER not in response.text
