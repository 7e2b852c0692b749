"""Clients that are not ours against the app on loopback, over the embedded engine and a tiny model."""

from __future__ import annotations

import asyncio
import json
import string
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
import torch
from pydantic import BaseModel

from lmray.data.tokenise import prompt_ids
from lmray.models.load import load_model, load_tokenizer
from lmray.serve.gateway import GatewaySettings, make_app
from lmray.testing.listening import listening
from lmray.testing.tiny import tiny_model_folder
from tests.unit.serve.fakes import FakeBackend
from tests.unit.serve.servers import MAX_LENGTH, EngineBackend, key
from tests.unit.serve.test_bad_input import LOOPS
from tests.unit.serve.test_tools import CALL, TEMPLATE, TOOL

MESSAGES: Any = [{"role": "user", "content": "日本語で答えてください 🙂"}]
CITIES = ("大阪市の天気は晴れ☀️", "東京🗼は雨")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("clients") / "tiny")


@pytest.fixture(scope="module")
def url(folder) -> Iterator[str]:
    settings = GatewaySettings("tiny", MAX_LENGTH, (key("mine"), key("once", requests_per_minute=1)))
    backend = EngineBackend(folder)
    try:
        with listening(make_app(backend, load_tokenizer(folder), settings), path="/v1") as url:
            yield url
    finally:
        asyncio.run(backend.engine.close())


@pytest.fixture(scope="module")
def client(url) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="mine", max_retries=0) as client:
        yield client


def greedy(folder, ids: tuple[int, ...], num: int) -> list[int]:
    """What `transformers` generates."""
    model = load_model(folder, "float32")
    told = {"attention_mask": torch.ones(1, len(ids)), "max_new_tokens": num, "do_sample": False}
    return model.generate(torch.tensor([ids]), **told)[0, len(ids) :].tolist()


def test_a_chat_is_answered_as_transformers_does_whole_and_streamed(client, folder):
    tokenizer = load_tokenizer(folder)
    expected = tokenizer.decode(greedy(folder, prompt_ids(tokenizer, MESSAGES), 24), skip_special_tokens=True)
    told = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_completion_tokens": 24}
    whole = client.chat.completions.create(**told)
    assert whole.choices[0].message.content == expected
    pieces = list(client.chat.completions.create(**told, stream=True, stream_options={"include_usage": True}))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == expected
    assert pieces[-1].usage == whole.usage


def test_a_seed_gives_the_same_answers_again_and_each_of_them_another(client):
    told = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "n": 3, "temperature": 1.2, "top_p": 0.95}
    first, again, other = (client.chat.completions.create(**told, seed=seed) for seed in (7, 7, 100))
    texts = [[choice.message.content for choice in answer.choices] for answer in (first, again, other)]
    assert texts[0] == texts[1]
    assert len({*texts[0], *texts[2]}) == 6


def test_a_bias_and_its_logprobs(client):
    told = {"model": "tiny", "messages": MESSAGES, "max_tokens": 2, "logit_bias": {"67": 100}, "temperature": 0}
    answer = client.chat.completions.create(**told, logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.content == "aa"
    for entry in answer.choices[0].logprobs.content:
        assert (entry.token, entry.bytes) == ("a", [0x61])
        assert entry.logprob < entry.top_logprobs[0].logprob


class Weather(BaseModel):
    city: Literal["大阪", "東京"]
    degrees: Literal[1, 20, 30]


def test_an_answer_is_parsed_as_the_schema_that_was_asked_for(client):
    pytest.importorskip("llguidance")
    told = {"model": "tiny", "messages": MESSAGES, "max_tokens": 200, "seed": 1}
    answer = client.chat.completions.parse(**told, response_format=Weather)
    assert isinstance(answer.choices[0].message.parsed, Weather)


def test_japanese_is_streamed_in_whole_characters(client):
    """The tiny model writes one byte a token; a schema makes them Japanese."""
    pytest.importorskip("llguidance")
    wanted: Any = {"name": "cities", "schema": {"enum": list(CITIES)}}
    form: Any = {"type": "json_schema", "json_schema": wanted}
    told = {"model": "tiny", "messages": MESSAGES, "n": 2, "seed": 3, "max_tokens": 100, "response_format": form}
    texts = ["", ""]
    for piece in client.chat.completions.create(**told, stream=True):
        choice = piece.choices[0]
        assert "\ufffd" not in (choice.delta.content or "")
        texts[choice.index] += choice.delta.content or ""
    assert all(json.loads(text) in CITIES for text in texts)


def test_a_json_object_is_one(client):
    pytest.importorskip("llguidance")
    told = {"model": "tiny", "messages": MESSAGES, "max_tokens": 300, "temperature": 0, "logit_bias": {"95": 20}}
    answer = client.chat.completions.create(**told, response_format={"type": "json_object"})
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


@pytest.mark.parametrize(
    "schema", [{"type": "object", "not": {"type": "string"}}, {"type": "objct"}, {"$ref": "http://example.org/x"}]
)
def test_a_schema_that_answers_cannot_be_held_to_is_refused(client, schema):
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=MESSAGES, response_format=form)
    assert refused.value.param == "response_format.json_schema.schema"


@pytest.mark.parametrize("name", LOOPS)
def test_a_schema_that_names_itself_ends_in_the_engine_too(client, name):
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": LOOPS[name]}}
    told = {"model": "tiny", "messages": MESSAGES, "max_tokens": 20, "response_format": form}
    try:
        assert client.chat.completions.create(**told).choices[0].finish_reason in ("stop", "length")
    except openai.BadRequestError as refused:
        assert refused.code == "invalid_value"
    assert client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=2).choices


@pytest.mark.parametrize(
    "fields", [{"seed": 2**63 - 200}, {"top_k": 10**12}, {"max_tokens": 10**12, "stop": "a"}], ids=str
)
def test_numbers_beyond_all_need_do_no_harm(client, fields):
    told: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 2, "n": 2, "extra_body": fields}
    assert len(client.chat.completions.create(**told).choices) == 2


def test_a_bias_of_a_token_that_is_none_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="token 99999 is none of the model's"):
        client.chat.completions.create(model="tiny", messages=MESSAGES, logit_bias={"99999": 1})


def test_errors_are_those_that_the_client_knows(url, client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=3)
    assert (refused.value.param, refused.value.code) == ("temperature", "invalid_value")
    assert refused.value.request_id
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with openai.OpenAI(base_url=url, api_key="once", max_retries=0) as once:
        once.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1)
        with pytest.raises(openai.RateLimitError) as limited:
            once.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1)
    assert limited.value.code == "rate_limit_exceeded"
    assert int(limited.value.response.headers["retry-after"]) >= 1


def test_tools_are_called_through_the_client(tokenizer, ids, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    backend = FakeBackend(ids(f"So: {CALL}"))
    with (
        listening(make_app(backend, tokenizer, GatewaySettings("tiny", MAX_LENGTH)), path="/v1") as url,
        openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client,
    ):
        told: Any = {"model": "tiny", "messages": MESSAGES, "tools": [TOOL]}
        whole = client.chat.completions.create(**told).choices[0]
        with client.chat.completions.stream(**told) as stream:
            streamed = stream.get_final_completion().choices[0]
    for choice in (whole, streamed):
        assert choice.finish_reason == "tool_calls"
        assert choice.message.tool_calls is not None
        assert json.loads(choice.message.tool_calls[0].function.arguments) == {"city": "大阪"}


def own_logprobs(folder, context: str, continuation: str) -> tuple[float, bool]:
    """The log probability of `continuation`, and whether it is what the model would say."""
    tokenizer = load_tokenizer(folder)
    before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context, continuation))
    with torch.no_grad():
        logprobs = load_model(folder, "float32")(torch.tensor([before + after])).logits[0].log_softmax(-1)
    rows = logprobs[len(before) - 1 : -1]
    return float(sum(rows[place, token] for place, token in enumerate(after))), rows.argmax(-1).tolist() == after


def test_an_echoed_prompt_has_the_models_logprobs(client, folder):
    told = {"model": "tiny", "prompt": "天気は晴れ", "max_tokens": 0, "echo": True, "logprobs": 1}
    answer = client.completions.create(**told).choices[0]
    assert answer.text == "天気は晴れ"
    assert answer.logprobs.text_offset[-1] == 4
    expected, _ = own_logprobs(folder, "天", "気は晴れ")
    assert sum(answer.logprobs.token_logprobs[3:]) == pytest.approx(expected, abs=1e-3)


def test_lm_eval_finds_the_loglikelihoods_of_the_model_itself(url, folder, monkeypatch):
    for package in ("lm_eval", "tenacity"):
        pytest.importorskip(package)
    api = pytest.importorskip("lm_eval.models.openai_completions")
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    monkeypatch.setenv("OPENAI_API_KEY", "mine")
    told = {"tokenizer_backend": "huggingface", "tokenizer": str(folder), "max_length": MAX_LENGTH, "batch_size": 2}
    model = api.LocalCompletionsAPI(model="tiny", base_url=f"{url}/completions", **told)
    pairs = [("a question", " and its answer"), ("質問", "答え"), ("x", "y")]
    pairs.append(greedy_pair(folder))
    asked = [instance("loglikelihood", {}, pair, place) for place, pair in enumerate(pairs)]
    found = model.loglikelihood(asked)
    assert found[-1][1], "the last pair is what the model would say"
    for (logprob, is_greedy), pair in zip(found, pairs, strict=True):
        expected, expected_greedy = own_logprobs(folder, *pair)
        assert logprob == pytest.approx(expected, abs=1e-3)
        assert is_greedy == expected_greedy


def greedy_pair(folder) -> tuple[str, str]:
    """A letter, and the letter that the model itself would write after it."""
    tokenizer = load_tokenizer(folder)
    for letter in string.ascii_letters:
        [token] = greedy(folder, tuple(tokenizer(letter, add_special_tokens=False)["input_ids"]), 1)
        if tokenizer.decode([token]) in tuple(string.ascii_letters):
            return letter, str(tokenizer.decode([token]))
    raise AssertionError("no letter is followed by a letter")
