"""What an engine tells besides tokens, and answers held to a grammar."""

from __future__ import annotations

import asyncio
import json

import jsonschema
import pytest
import torch

from lmray.engines.base import Request, Sampling, TokenEvent
from lmray.engines.native import Native
from lmray.errors import DataError, LmrayError
from lmray.testing.tiny import tiny_tokenizer
from tests.unit.engines.conftest import NUM_NEW, STOP, greedy

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["大阪", "Rome"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["city", "n"],
    "additionalProperties": False,
}


pytestmark = pytest.mark.usefixtures("way")


def stepped(model, *requests: Request, tokenizer=None, **changes) -> dict[str, list[TokenEvent]]:
    """Events of all `requests`, stepped side by side. Raises what one ended with."""
    told = {"stop_token_ids": STOP, "tokenizer": tokenizer}
    stepper = Native(**{"max_batch_size": 4, "max_length": 128, **changes}).make_stepper(model, **told)
    events: dict[str, list[TokenEvent]] = {request.id: [] for request in requests}
    for request in requests:
        stepper.add(request)
    while stepper.busy:
        for request_id, outcome in stepper.step():
            if isinstance(outcome, LmrayError):
                raise outcome
            events[request_id].append(outcome)
    return events


def own_logprobs(model, ids: list[int]) -> torch.Tensor:
    """[T, V]: row t are the log probabilities of what follows token t."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("prefill", [512, 7, 1])
def test_logprobs_of_prompt_and_answer_are_the_models(model, prompts, prefill):
    prompt = prompts[1]
    asked = Sampling(6, logprobs=2, prompt_logprobs=1)
    told = stepped(
        model,
        Request("before", prompt, Sampling(9)),  # whose keys and values it could share
        Request("b", prompts[0], Sampling(9)),
        Request("a", prompt, asked),
        max_prefill_tokens=prefill,
    )
    events = told["a"]
    assert [event.token_id for event in told["before"]] == greedy(model, prompt, 9)
    answer = [event.token_id for event in events if event.token_id is not None]
    assert answer == greedy(model, prompt, 6)
    expected = own_logprobs(model, [*prompt, *answer])
    read = events[0].prompt_logprobs
    assert read is not None and read[0] is None
    assert [one.token_id for one in read[1:] if one] == list(prompt[1:])
    for place, told in enumerate([*read[1:], *(event.logprob for event in events)]):
        assert told is not None
        torch.testing.assert_close(told.logprob, float(expected[place, told.token_id]), atol=1e-4, rtol=0)
        assert told.top[0][0] == int(expected[place].argmax())
    assert [len(event.logprob.top) for event in events if event.logprob] == [2] * len(events)
    assert all(event.prompt_logprobs is None and event.prefill_s is None for event in events[1:])
    assert events[0].prefill_s is not None and events[0].prefill_s > 0


def test_a_stop_token_is_told_by_its_logprob_alone(model, prompts):
    chosen = Sampling(9, logit_bias=((STOP[0], 1000.0),), logprobs=0)
    [event] = stepped(model, Request("a", prompts[0], chosen))["a"]
    assert (event.token_id, event.finish_reason) == (None, "stop")
    assert event.logprob is not None
    assert event.logprob.token_id == STOP[0]


def test_without_tokens_to_draw_a_prompt_is_only_read(model, prompts):
    full = (5,) * 128
    events = stepped(
        model,
        Request("a", prompts[0], Sampling(0, prompt_logprobs=0)),
        Request("b", full, Sampling(0)),
        Request("c", prompts[1], Sampling(NUM_NEW)),
    )
    assert events["a"] == [TokenEvent("a", None, "length", prompt_logprobs=events["a"][0].prompt_logprobs)]
    assert len(events["a"][0].prompt_logprobs or ()) == len(prompts[0])
    assert events["b"] == [TokenEvent("b", None, "length")]
    assert [event.token_id for event in events["c"]] == greedy(model, prompts[1])


@pytest.fixture
def guided(model):
    """Steps requests on an engine that knows what tokens say."""
    pytest.importorskip("llguidance")
    return lambda *requests: stepped(model, *requests, tokenizer=tiny_tokenizer())


def grammar(schema: dict) -> str:
    held = {**schema, "x-guidance": {"whitespace_flexible": False}}
    return json.dumps({"grammars": [{"name": "json_schema", "json_schema": held}]})


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_an_answer_matches_its_grammar_and_its_neighbours_feel_nothing(guided, model, prompts, temperature):
    held = [
        Request(str(seed), prompts[seed], Sampling(99, temperature, seed=seed, grammar=grammar(SCHEMA)))
        for seed in range(3)
    ]
    events = guided(*held, Request("free", prompts[3], Sampling(NUM_NEW)))
    assert [event.token_id for event in events["free"] if event.token_id is not None] == greedy(model, prompts[3])
    for request in held:
        assert events[request.id][-1].finish_reason == "stop"
        ids = [event.token_id for event in events[request.id] if event.token_id is not None]
        jsonschema.validate(json.loads(tiny_tokenizer().decode(ids)), SCHEMA)


def test_a_grammar_that_is_none_ends_its_request_alone(guided, prompts):
    with pytest.raises(DataError, match="grammar: cannot be followed"):
        guided(Request("a", prompts[0], Sampling(9, grammar="start: missing")))


def test_a_grammar_that_is_none_leaves_its_neighbours_alone(model, prompts):
    pytest.importorskip("llguidance")
    told = {"stop_token_ids": STOP, "tokenizer": tiny_tokenizer()}
    stepper = Native(max_batch_size=3, max_length=128).make_stepper(model, **told)
    asked = [(0, None), (1, "start: missing"), (3, None)]
    for place, held in asked:
        stepper.add(Request(str(place), prompts[place], Sampling(NUM_NEW, grammar=held)))
    outcomes: dict[str, list] = {str(place): [] for place, _ in asked}
    while stepper.busy:
        for request_id, outcome in stepper.step():
            outcomes[request_id].append(outcome)
    [error] = outcomes["1"]
    assert isinstance(error, LmrayError)
    for place in (0, 3):
        ids = [event.token_id for event in outcomes[str(place)] if event.token_id is not None]
        assert ids == greedy(model, prompts[place])


def test_an_engine_that_knows_no_tokens_refuses_a_grammar(model, prompts):
    async def main() -> None:
        engine = Native(max_batch_size=1, max_length=128).start(model, stop_token_ids=STOP, threads=1)
        try:
            async for _ in engine.submit(Request("a", prompts[0], Sampling(9, grammar="start: /a/"))):
                pass
        finally:
            await engine.close()

    with pytest.raises(DataError, match="this engine holds answers to no grammar"):
        asyncio.run(main())
