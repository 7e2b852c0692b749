"""Tools in requests and tool calls in answers."""

from __future__ import annotations

import json

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from lmray.serve.tool_forms import form_of, read_whole
from lmray.serve.tools_bare import BareCalls, Llama, Mistral
from lmray.serve.tools_tagged import Tagged, TaggedCalls
from lmray.testing.tiny import CHATML
from tests.unit.serve.fakes import FakeBackend
from tests.unit.serve.test_gateway import CALLED, TOOL, sse

CALLED_CITIES = (
    "{% for message in messages %}{% for call in message.tool_calls or [] %}"
    "{{ call.function.arguments.city }}!{% endfor %}{% endfor %}"
)
TEMPLATE = "{% if tools %}{{ tools[0].function.name }}: <tool_call>{}</tool_call>\n{% endif %}" + CALLED_CITIES + CHATML
LLAMA = (
    """{% if tools %}ipython {{ tools[0].function.name }}{{ '{"name": f, "parameters": d}' }}{% endif %}"""
    + CALLED_CITIES
    + CHATML
)
MISTRAL = "{% if tools %}[AVAILABLE_TOOLS]{{ tools[0].function.name }}[TOOL_CALLS]{% endif %}" + CALLED_CITIES + CHATML
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "大阪"}}\n</tool_call>'


@pytest.fixture(autouse=True)
def _template(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)


def prompt(backend: FakeBackend, tokenizer) -> str:
    return tokenizer.decode(backend.requests[0].prompt_ids)


def test_the_template_is_given_the_tools_and_what_came_of_earlier_calls(chat, tokenizer):
    backend = FakeBackend()
    turns = [{"role": "user", "content": "hi"}, CALLED, {"role": "tool", "content": "晴れ", "tool_call_id": "c1"}]
    assert chat(backend, tools=[TOOL], messages=turns).status_code == 200
    found = prompt(backend, tokenizer)
    assert found.startswith("weather: ") and "大阪!" in found and "<|im_start|>tool\n晴れ<|im_end|>" in found


def test_a_model_that_may_call_nothing_is_told_of_no_tools(chat, tokenizer, ids):
    backend = FakeBackend(ids(CALL))
    body = chat(backend, tools=[TOOL], tool_choice="none").json()
    assert "weather" not in prompt(backend, tokenizer)
    assert body["choices"][0]["message"]["content"] == CALL and body["choices"][0]["finish_reason"] == "stop"


def test_calls_are_taken_out_of_a_whole_answer(chat, ids):
    body = chat(FakeBackend(ids(f"Let me see.\n{CALL}\n{CALL}\n")), tools=[TOOL]).json()
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "Let me see."
    first, second = choice["message"]["tool_calls"]
    assert first["function"]["name"] == "weather" and json.loads(first["function"]["arguments"]) == {"city": "大阪"}
    assert first["id"] != second["id"]
    ChatCompletion.model_validate(body)
    alone = chat(FakeBackend(ids(CALL)), tools=[TOOL]).json()["choices"][0]["message"]
    assert alone["content"] is None and len(alone["tool_calls"]) == 1


def test_calls_are_streamed_whole_and_their_text_is_not(chat, ids):
    events = sse(chat(FakeBackend(ids(f"So: {CALL}\n{CALL}")), tools=[TOOL], stream=True).text)
    deltas = [event["choices"][0]["delta"] for event in events[:-1]]
    assert "".join(delta.get("content", "") for delta in deltas) == "So: "
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [call["index"] for call in calls] == [0, 1]
    assert all(json.loads(call["function"]["arguments"]) == {"city": "大阪"} for call in calls)
    assert events[-2]["choices"][0]["finish_reason"] == "tool_calls"
    for event in events[:-1]:
        ChatCompletionChunk.model_validate(event)


@pytest.mark.parametrize(
    "text", ["a <tool_call>{broken</tool_call> b", "<tool_call>[]</tool_call>", "x <tool_cal", "<tool_call>{", "1 < 2"]
)
@pytest.mark.parametrize("size", [1, 4, 100])
def test_what_is_no_call_stays_text(text, size):
    calls, said = TaggedCalls(), ""
    for start in range(0, len(text), size):
        piece, found = calls.push(text[start : start + size])
        assert found == ()
        said += piece
    assert (said + calls.finish()[0], calls.num_calls) == (text, 0)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"name": "f", "arguments": {"x": NaN}}'], ids=["deep", "no number"]
)
def test_what_no_client_could_read_between_tags_stays_text(content):
    text = f"<tool_call>{content}</tool_call>"
    assert TaggedCalls().push(text) == (text, ())


def test_an_array_is_several_calls():
    found = TaggedCalls().push(
        '<tool_call>[{"name": "a", "arguments": {}}, {"name": "b", "arguments": {}}]</tool_call>'
    )
    assert [call["function"]["name"] for call in found[1]] == ["a", "b"]


def test_an_answer_cut_within_a_call_is_cut(chat, ids):
    choice = chat(FakeBackend(ids(CALL[:20]), finish_reason="length"), tools=[TOOL]).json()["choices"][0]
    assert choice["finish_reason"] == "length" and choice["message"]["content"] == CALL[:20]


def test_a_template_says_in_which_form_it_asks_for_calls():
    found = [form_of(one) for one in (TEMPLATE, LLAMA, MISTRAL, CHATML, None, [])]
    assert [type(one) for one in found[:3]] == [Tagged, Llama, Mistral] and found[3:] == [None] * 3
    assert form_of("<tool_call>\n<function=x>\n</function>\n</tool_call>") is None, "XML is not read"
    assert form_of(MISTRAL + "[ARGS]") is None


ONE = '{"name": "weather", "parameters": {"city": "大阪"}}'
ARRAY = '[{"name": "weather", "arguments": {"city": "大阪"}}]'


@pytest.mark.parametrize("template", [LLAMA, MISTRAL], ids=["llama", "mistral"])
@pytest.mark.parametrize("text", [ONE, f" {ONE};\n{ONE}", ARRAY, f"{ONE}\n"], ids=["one", "two", "array", "line"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_an_answer_that_is_calls_in_json_is_calls(chat, ids, tokenizer, monkeypatch, template, text, stream):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    response = chat(FakeBackend(ids(text)), tools=[TOOL], stream=stream)
    if stream:
        deltas = [event["choices"][0]["delta"] for event in sse(response.text)[:-1]]
        calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
        assert not any(delta.get("content") for delta in deltas)
        assert [call["index"] for call in calls] == list(range(text.count("weather")))
    else:
        (choice,) = response.json()["choices"]
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
        calls = choice["message"]["tool_calls"]
    assert len(calls) == text.count("weather")
    assert all(json.loads(call["function"]["arguments"]) == {"city": "大阪"} for call in calls)
    assert all(len(call["id"]) == 9 and call["id"].isalnum() for call in calls), "as Mistral's template wants them"


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "  plain",
        '{"city": "大阪"}',
        f"{ONE} and text",
        ONE[:-1],
        '{"name": "other", "parameters": {}}',
        '{"name": "weather", "parameters": "x"}',
        '{"name": "weather", "parameters": {"x": NaN}}',
        "[" * 100_000,
        "[]",
        "",
        " ",
    ],
    ids=lambda text: text[:30],
)
@pytest.mark.parametrize("size", [1, 7, 10**6])
def test_json_that_is_no_call_stays_text(text, size):
    calls, said = BareCalls({"weather"}), ""
    size = size if len(text) < 1000 else 10**6
    for start in range(0, len(text), size):
        piece, found = calls.push(text[start : start + size])
        assert found == ()
        said += piece
    rest, found = calls.finish()
    assert (said + rest, found, calls.num_calls) == (text, (), 0)


def test_text_that_is_no_json_is_not_held_back():
    calls = BareCalls()
    assert [calls.push(piece)[0] for piece in (" ", "So", ' {"name"', "[")] == ["", " So", ' {"name"', "["]


def test_no_more_calls_are_read_than_asked_for(chat, ids, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", LLAMA)
    body = chat(FakeBackend(ids(f"{ONE}; {ONE}")), tools=[TOOL], parallel_tool_calls=False).json()
    assert len(body["choices"][0]["message"]["tool_calls"]) == 1


@pytest.mark.parametrize("text", [f"So:{CALL}", ONE, ARRAY])
def test_a_whole_answer_is_read_in_any_form(text):
    said, (call,) = read_whole(text)
    assert said == ("So:" if text.startswith("So:") else "") and call["function"]["name"] == "weather"
    assert read_whole("no call {") == ("no call {", ())
