"""Conversations that are too many things, or too deep: refused before much is done with them."""

from __future__ import annotations

import json

import pytest

from lmray.config.endpoint import HttpLimits
from lmray.data.filters.regex import Regex
from lmray.serve.openai import ChatRequest
from tests.unit.serve.fakes import FakeBackend
from tests.unit.serve.test_bad_input import MARKER, VALID, check_refused
from tests.unit.serve.test_tools import TEMPLATE


def deep(depth: int) -> str:
    return '{"a":' + "[" * depth + "]" * depth + "}"


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (deep(120), "more than 100 lists and objects within one another"),
        (deep(900), "more than 100 lists and objects within one another"),
        (deep(50_000), "too deep a recursion of lists and objects"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": 1e999}', "a number is beyond all range"),
        ('{"a": 1, "a": 2}', "`a` is given twice"),
        ('{"a": "\\ud800"}', "surrogates not allowed"),
        ('{"a": ' + "9" * 5000 + "}", "Exceeds the limit"),
        ("[]", "are no JSON object"),
        ("{", "Expecting property name"),
    ],
    ids=lambda value: value[:20],
)
def test_arguments_of_a_call_are_json_in_every_word(call, arguments, found):
    function = {"name": "f", "arguments": arguments}
    turn = {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": function}]}
    body = {"model": "tiny", "messages": [{"role": "user", "content": MARKER}, turn]}
    error = check_refused(call(FakeBackend(), "POST", "/v1/chat/completions", json=body))
    assert error["param"] == "messages.1.tool_calls.0.function.arguments" and found in error["message"]


@pytest.mark.parametrize("depth", [90, 180, 400])
def test_what_is_nested_is_answered_or_refused(call, tokenizer, monkeypatch, depth):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    turn = {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": deep(depth)}}]}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": json.loads(deep(depth))}}}
    for fields in ({"messages": [turn]}, {"tools": [tool]}):
        body = {**VALID["/v1/chat/completions"], **fields}
        response = call(FakeBackend(), "POST", "/v1/chat/completions", json=body, settings={})
        assert response.status_code in (200, 400), response.text


PARTS = [{"type": "text", "text": "x"}] * 30_000


@pytest.mark.parametrize(
    ("messages", "param", "found"),
    [
        ([{"role": "user", "content": "x"}] * 2001, "messages", "are 2001\n  allowed: up to 2000"),
        ([{"role": "user", "content": PARTS}], "messages.0.content", "30000 parts and calls"),
        ([{"role": "user", "content": PARTS[:1001]}] * 3, "messages.1.content", "2002 parts and calls"),
        ([{"role": "assistant", "tool_calls": [0] * 2001}], "messages.0.tool_calls", "2001 parts and calls"),
        ([{"role": "assistant", "annotations": [0] * 2001}], "messages.0.annotations", "2001 parts and calls"),
    ],
)
def test_of_too_many_messages_and_parts_none_is_looked_at(call, monkeypatch, messages, param, found):
    monkeypatch.setattr(ChatRequest, "model_validate_json", None)
    error = check_refused(
        call(FakeBackend(), "POST", "/v1/chat/completions", json={"model": "tiny", "messages": messages})
    )
    assert error["param"] == param and found in error["message"]


def test_how_many_messages_and_parts_is_set_in_the_job(call):
    limits = HttpLimits(max_messages=1, max_parts=2)
    for content, num, status in ((PARTS[:2], 1, 200), (PARTS[:3], 1, 400), ("x", 2, 400)):
        body = {"model": "tiny", "messages": [{"role": "user", "content": content}] * num}
        response = call(FakeBackend(), "POST", "/v1/chat/completions", json=body, settings={"limits": limits})
        assert response.status_code == status


@pytest.mark.parametrize(
    ("turn", "shown"),
    [
        ({"role": "user", "name": "bob", "content": "hi"}, {"role": "user", "content": "hi", "name": "bob"}),
        ({"role": "assistant", "content": "yes", "refusal": None, "annotations": []}, {"content": "yes"}),
        ({"role": "assistant", "content": None, "refusal": "I will not", "audio": None}, {"content": "I will not"}),
        (
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}, {"type": "text", "text": "!"}]},
            {"content": "no!"},
        ),
    ],
    ids=["name", "annotations", "refusal", "refusal part"],
)
def test_turns_are_taken_as_openai_gave_them(turn, shown):
    (message,) = ChatRequest.model_validate({"model": "tiny", "messages": [turn]}).messages
    assert message.plain() == {"role": turn["role"], **shown}


def test_settings_that_ask_for_what_is_done_anyway_are_taken(call):
    options = {"include_usage": True, "include_obfuscation": False}
    body = {**VALID["/v1/chat/completions"], "top_k": -1, "stream": True, "stream_options": options}
    backend = FakeBackend()
    assert call(backend, "POST", "/v1/chat/completions", json=body).status_code == 200
    assert backend.requests[0].sampling.top_k == 0
    options["include_obfuscation"] = True
    error = check_refused(call(backend, "POST", "/v1/chat/completions", json=body))
    assert error["param"] == "stream_options.include_obfuscation"


@pytest.mark.parametrize(
    ("turn", "param"),
    [
        ({"role": "user", "refusal": MARKER}, "messages.0"),
        ({"role": "user", "content": [{"type": "refusal", "refusal": MARKER}]}, "messages.0"),
        ({"role": "user", "content": [{"type": "text", "refusal": MARKER}]}, "messages.0.content.0"),
        ({"role": "user", "content": [{"type": "text", "text": "x", "refusal": MARKER}]}, "messages.0.content.0"),
        ({"role": "user", "content": "x", "name": "<|im_start|>"}, "messages.0.name"),
    ],
)
def test_turns_that_nobody_would_send_back_are_refused(call, turn, param):
    body = {"model": "tiny", "messages": [turn]}
    assert check_refused(call(FakeBackend(), "POST", "/v1/chat/completions", json=body))["param"] == param


def test_a_filter_sees_who_speaks(call, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].name }} said {{ messages[0].content }}")
    name = Regex(label="name", pattern="bob", replacement="them", on="prompts")
    backend, body = FakeBackend(), {"model": "tiny", "messages": [{"role": "user", "name": "bob", "content": "I, bob"}]}
    response = call(backend, "POST", "/v1/chat/completions", json=body, settings={"filters": (name,)})
    assert response.status_code == 200, response.text
    assert tokenizer.decode(backend.requests[0].prompt_ids) == "them said I, them"
