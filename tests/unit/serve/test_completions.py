"""`/v1/completions`, several answers to a request, and log probabilities, over a fake backend."""

from __future__ import annotations

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.unit.serve.conftest import MAX_LENGTH
from tests.unit.serve.fakes import FakeBackend
from tests.unit.serve.test_gateway import sse

LETTER_H, LETTER_I = 74, 75
"""Tokens of these letters."""


@pytest.fixture
def complete(call):
    """One text completion of `backend`; keywords are fields of the request."""

    def ask(backend: FakeBackend, **fields):
        return call(backend, "POST", "/v1/completions", json={"model": "tiny", "prompt": "hi", **fields})

    return ask


def test_a_completion_continues_a_text_as_it_stands(complete, ids):
    backend = FakeBackend(ids(" 日本"))
    body = complete(backend).json()
    Completion.model_validate(body)
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": " 日本", "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 7, "total_tokens": 9}
    assert backend.requests[0].prompt_ids == tuple(ids("hi"))
    assert backend.requests[0].sampling.max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", ["hi"]),
        (["hi", "日"], ["hi", "日"]),
        ([LETTER_H, LETTER_I], ["hi"]),
        ([[LETTER_H], [LETTER_I, LETTER_H]], ["h", "ih"]),
        (["i", [LETTER_H]], ["i", "h"]),
    ],
)
def test_prompts_are_texts_or_tokens_or_lists_of_them(complete, ids, prompt, expected):
    backend = FakeBackend(ids("."))
    body = complete(backend, prompt=prompt, echo=True, n=2).json()
    assert [request.prompt_ids for request in backend.requests] == [tuple(ids(one)) for one in expected for _ in "12"]
    assert [choice["text"] for choice in body["choices"]] == [one + "." for one in expected for _ in "12"]
    assert [choice["index"] for choice in body["choices"]] == list(range(2 * len(expected)))
    assert body["usage"]["prompt_tokens"] == sum(len(ids(one)) for one in expected)


def test_echo_with_logprobs_tells_the_prompts_and_the_stop_tokens_too(complete, ids):
    """What lm-eval's `local-completions` adds up: all but the last entry, from the context's length on."""
    logprobs = complete(FakeBackend(ids("")), prompt="日a", echo=True, logprobs=2, max_tokens=1).json()["choices"][0]
    assert logprobs["text"] == "日a"
    told = logprobs["logprobs"]
    assert told["tokens"] == ["bytes:\\xe6", "bytes:\\x97", "bytes:\\xa5", "a", "<|im_end|>"]
    assert told["token_logprobs"] == [None, -1.0, -1.0, -1.0, -1.0]
    assert told["top_logprobs"][0] is None
    assert told["top_logprobs"][1] == {"bytes:\\x97": -1.0, "a": -2.0}
    assert told["top_logprobs"][3] == {"a": -1.0}
    assert told["text_offset"] == [0, 0, 0, 1, 2]


def test_logprobs_alone_are_those_of_the_answer(complete, ids):
    backend = FakeBackend(ids("é"))
    told = complete(backend, logprobs=0).json()["choices"][0]["logprobs"]
    assert told["top_logprobs"] == [{"bytes:\\xc3": -1.0}, {"bytes:\\xa9": -1.0}, {"<|im_end|>": -1.0}]
    assert told["text_offset"] == [0, 0, 1]
    assert backend.requests[0].sampling.prompt_logprobs is None


def test_prompt_logprobs_are_told_by_token(complete, ids):
    choice = complete(FakeBackend(ids("x")), prompt_logprobs=1).json()["choices"][0]
    assert choice["prompt_logprobs"] == [None, {str(LETTER_I): {"logprob": -1.0, "decoded_token": "i"}}]
    assert choice["text"] == "x"


def test_a_prompt_can_be_read_without_an_answer(complete, ids):
    backend = FakeBackend(())
    backend.finish_reason = "stop"
    full = list(ids("x" * MAX_LENGTH))
    body = complete(backend, prompt=full, max_tokens=0, echo=True, logprobs=0).json()
    assert len(body["choices"][0]["logprobs"]["tokens"]) == MAX_LENGTH + 1
    assert backend.requests[0].sampling.max_tokens == 0


def test_a_completion_is_streamed(complete, ids):
    for event in sse(complete(FakeBackend(ids("é!")), stream=True).text)[:-1]:
        Completion.model_validate({**event, "choices": [{**event["choices"][0], "finish_reason": "stop"}]})
    events = sse(complete(FakeBackend(ids("é!")), echo=True, logprobs=0, stream=True).text)
    assert events[-1] == "[DONE]"
    choices = [event["choices"][0] for event in events[:-1]]
    assert "".join(choice["text"] for choice in choices) == "hié!"
    assert [token for choice in choices for token in choice["logprobs"]["tokens"]][:3] == ["h", "i", "bytes:\\xc3"]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]


@pytest.mark.parametrize(
    ("fields", "param", "found"),
    [
        ({"prompt": None}, "prompt", "Field required"),
        ({"prompt": 7}, "prompt", "neither a text nor a list of token ids"),
        ({"prompt": ["a", 7]}, "prompt", "neither a text"),
        ({"prompt": [True]}, "prompt", "neither a text"),
        ({"prompt": []}, "prompt", "is empty"),
        ({"prompt": ["a", ""]}, "prompt", "is empty"),
        ({"prompt": [259]}, "prompt", "token 259 is none of the model's"),
        ({"prompt": "x" * MAX_LENGTH}, "prompt", "the prompt is 256 tokens long"),
        ({"prompt": ["a", "b"], "n": 65}, "prompt", "2 prompts with 65 answers each"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"logprobs": True}, "logprobs", "valid integer"),
        ({"n": "2"}, "n", "valid integer"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"stream": 1}, "stream", "valid boolean"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"suffix": "x"}, "suffix", "'x' is not supported"),
        ({"messages": []}, "messages", "unknown field"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "are not streamed"),
    ],
)
def test_a_wrong_field_is_named(complete, fields, param, found):
    backend = FakeBackend()
    response = complete(backend, **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert response.json()["error"]["code"] == "invalid_value"
    assert found in response.json()["error"]["message"]
    assert backend.requests == []


def test_several_answers_have_seeds_and_ids_of_their_own(chat, ids):
    backend = FakeBackend(ids("ab"))
    body = chat(backend, n=3, seed=5).json()
    ChatCompletion.model_validate(body)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert [request.sampling.seed for request in backend.requests] == [5, 6, 7]
    assert len({request.id for request in backend.requests}) == 3
    assert body["usage"]["completion_tokens"] == 6
    assert body["usage"]["prompt_tokens"] == len(backend.requests[0].prompt_ids)


def test_several_answers_are_streamed_by_index(chat, ids):
    backend = FakeBackend(ids("one. Two"))
    events = sse(chat(backend, n=2, stop=".", stream=True).text)
    for index in (0, 1):
        own = [event["choices"][0] for event in events[:-1] if event["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in own) == "one"
        assert own[-1]["finish_reason"] == "stop"
    assert sorted(backend.closed) == sorted(request.id for request in backend.requests)


def test_chat_logprobs_come_with_bytes(chat, ids):
    body = chat(FakeBackend(ids("é")), logprobs=True, top_logprobs=1).json()
    ChatCompletion.model_validate(body)
    content = body["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[0xC3], [0xA9], list(b"<|im_end|>")]
    assert content[0]["top_logprobs"] == [{"token": "\ufffd", "logprob": -1.0, "bytes": [0xC3]}]
    events = sse(chat(FakeBackend(ids("é")), logprobs=True, stream=True).text)
    streamed = [entry for event in events[:-1] for entry in (event["choices"][0]["logprobs"] or {}).get("content", [])]
    assert [entry["bytes"] for entry in streamed] == [entry["bytes"] for entry in content]
    for event in events[:-1]:
        ChatCompletionChunk.model_validate(event)
