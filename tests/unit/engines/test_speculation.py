"""Speculation changes no text: greedy answers are `transformers`', draws are the model's, whatever is proposed."""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from itertools import count
from pathlib import Path

import pytest
import torch
import transformers
from scipy.stats import chisquare

from lmray.config import Document, decode
from lmray.engines import _payoff, _speculator
from lmray.engines._core import Sampler
from lmray.engines._slots import Row
from lmray.engines._speculation.draft import Draft
from lmray.engines._speculation.prompt_lookup import PromptLookup
from lmray.engines.base import Request, Sampling
from lmray.engines.native import Native
from lmray.errors import ConfigError, LmrayError
from lmray.models.load import load_model
from lmray.testing.tiny import tiny_config, tiny_model_folder, tiny_tokenizer
from tests.unit.engines.conftest import NUM_NEW, STOP, greedy
from tests.unit.engines.paged import in_company, make, run

NO_STOP = frozenset({-1})


@pytest.fixture(autouse=True)
def _all_steps_take_as_long(monkeypatch):
    """So that whatever is right at times pays, from the start."""
    monkeypatch.setattr(_payoff, "PLAIN_STEPS", 1)
    monkeypatch.setattr(_speculator, "perf_counter", count().__next__)


@pytest.fixture
def prompts(prompts) -> list[tuple[int, ...]]:
    """The usual ones, some that begin like the longest, and one that repeats itself."""
    longest = prompts[3]
    return [*prompts, longest, longest[:32], (*longest[:20], 7, 8, 9), prompts[0] * 6]


@pytest.fixture(scope="module")
def draft_folders(model_folder, tmp_path_factory) -> dict[str, Path]:
    """A draft that knows nothing, one that knows a little and one that knows all."""
    root = tmp_path_factory.mktemp("drafts")
    stranger = tiny_model_folder(root / "stranger", seed=9, num_hidden_layers=1)
    noisy = load_model(model_folder, "float32")
    with torch.no_grad():
        for seed, weight in enumerate(noisy.parameters()):
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    noisy.save_pretrained(root / "noisy")
    tiny_tokenizer().save_pretrained(root / "noisy")
    return {"stranger": stranger, "noisy": root / "noisy", "twin": model_folder}


class Oracle:
    """Proposes what will be drawn, but now and then something else, or nothing."""

    def __init__(self, known):
        self._known, self._source = known, random.Random(0)

    def propose(self, asked):
        return [self._guess(sequence, room) for sequence, room in asked]

    def _guess(self, sequence, room: int) -> list[int]:
        request = sequence.request
        following = [*self._known[request.adapter, request.prompt_ids], *STOP][sequence.num_generated :]
        right = following[: self._source.randrange(room + 1)]
        return [token if self._source.random() < 0.8 else 5 for token in right]

    def forget(self, blocks):
        pass


def twin(folder: Path) -> Draft:
    """A draft that knows all: the model itself."""
    return Draft(model=str(folder), num_tokens=4)


@pytest.fixture(scope="module")
def known(model_folder, adapter_folders):
    """Greedy answers by adapter and prompt, of an engine without speculation, which other tests hold to be exact."""
    answers: dict[tuple, list[int]] = {}

    def ask(prompts) -> dict[tuple, list[int]]:
        wanted = [(name, one) for one in prompts for name in (None, "a", "b") if (name, one) not in answers]
        stepper = make(load_model(model_folder, "float32"), adapter_folders, max_batch_size=8)
        for place, (name, prompt) in enumerate(wanted):
            stepper.add(Request(str(place), prompt, Sampling(NUM_NEW), name))
        found = run(stepper)
        answers.update({key: found[str(place)] for place, key in enumerate(wanted)})
        return answers

    return ask


SIZES = [(8, 512, None), (8, 7, 240), (3, 16, 80), (1, 5, None), (8, 33, 128)]
"""Rows, tokens of prompts in a step, tokens that the cache holds."""


@pytest.mark.parametrize(("rows", "prefill", "cache"), SIZES)
@pytest.mark.parametrize("proposer", ["oracle", "prompt_lookup", "twin", "noisy", "stranger"])
def test_greedy_text_is_the_same_in_every_company(
    model, adapter_folders, draft_folders, prompts, known, rows, prefill, cache, proposer
):
    """Batch sizes, chunk sizes, caches that are too small, adapters, neighbours that are cancelled."""
    source, expected = random.Random(f"{rows} {prefill} {proposer}"), known(prompts)
    sizes = {"max_batch_size": rows, "max_prefill_tokens": prefill, "cache_tokens": cache}
    folder = draft_folders.get(proposer)
    speculation = Draft(model=str(folder), num_tokens=5) if folder else PromptLookup(max_matching_ngram_size=1)
    stepper = make(model, adapter_folders, speculation=speculation, **sizes)
    if proposer == "oracle":
        stepper.speculate(Oracle(expected), 6)
    found = in_company(stepper, prompts, source, max_steps=5)
    assert found == [(key, expected[key]) for key, _ in found]
    stats = stepper.stats()
    assert stats["free_blocks"] == stats["num_blocks"]
    assert stats["speculation"]["proposed"] > 0
    if proposer in ("oracle", "twin", "noisy"):
        assert stats["speculation"]["accepted"] > 5
    if cache == 128 and proposer == "stranger":
        assert stats["preemptions"] > 0


def test_what_is_known_here_is_what_transformers_says(model, prompts, known):
    for place in (3, 9):
        assert known(prompts)[None, prompts[place]] == greedy(model, prompts[place])


def test_a_draft_that_knows_all_is_always_right_and_saves_steps(model, model_folder, prompts):
    """Where every proposal is accepted, its keys and values are right too, block for block."""

    def steps(stepper) -> int:
        stepper.add(Request("a", prompts[3], Sampling(30, logit_bias=((STOP[0], -1e9),))))
        num_steps = 0
        while stepper.busy:
            num_steps += 1
            stepper.step()
        return num_steps

    plain, speculating = make(model), make(model, speculation=twin(model_folder))
    assert steps(plain) == 30
    assert steps(speculating) < 12
    told = speculating.stats()["speculation"]
    assert told["acceptance"] == 1.0
    assert told["active"]
    json.dumps(told)


def test_a_draft_catches_up_with_a_long_prompt_in_parts(model, model_folder, prompts):
    prompt = prompts[3] * 3
    stepper = make(model, speculation=twin(model_folder), max_length=200, max_prefill_tokens=16)
    stepper.add(Request("a", prompt, Sampling(NUM_NEW)))
    stepper.add(Request("b", prompt, Sampling(NUM_NEW)))
    answers = run(stepper)
    assert answers["a"] == answers["b"] == greedy(model, prompt)
    assert stepper.stats()["speculation"]["acceptance"] == 1.0


def test_an_answer_ends_where_it_would_have_ended(model, model_folder, prompts):
    """By its length, by the row's, and by a stop token that is proposed: nothing comes behind it."""
    drafted = Draft(model=str(model_folder), num_tokens=8)
    for sampling, max_length in ((Sampling(7), 80), (Sampling(99), 24), (Sampling(99), 80)):
        asked = Request("a", prompts[1], sampling)
        told = []
        for stepper in (
            make(model, max_length=max_length),
            make(model, speculation=drafted, max_length=max_length),
        ):
            stepper.add(asked)
            events = []
            while stepper.busy:
                events += [outcome for _, outcome in stepper.step()]
            told.append(events)
        assert told[0] == told[1]
        assert [event.finish_reason for event in told[0][:-1]] == [None] * (len(told[0]) - 1)


SAMPLINGS = {
    "drawn": Sampling(NUM_NEW, temperature=0.7, seed=3),
    "cut": Sampling(NUM_NEW, temperature=1.0, top_k=9, top_p=0.9, min_p=0.02, seed=4),
    "penalties": Sampling(NUM_NEW, repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2),
    "bias": Sampling(NUM_NEW, logit_bias=((70, 3.0), (STOP[0], -1e9))),
    "logprobs": Sampling(NUM_NEW, logprobs=3, prompt_logprobs=1),
    "all": Sampling(NUM_NEW, temperature=0.5, seed=5, repetition_penalty=1.1, logit_bias=((80, 2.0),), logprobs=1),
}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_equal_seeds_penalties_biases_and_log_probabilities_are_those_without_speculation(
    model, model_folder, prompts, name
):
    told = []
    for speculation in (None, twin(model_folder), PromptLookup(max_matching_ngram_size=1)):
        stepper = make(model, speculation=speculation)
        for place in (0, 3, 9):
            stepper.add(Request(str(place), prompts[place], SAMPLINGS[name]))
        events = defaultdict(list)
        while stepper.busy:
            for request_id, outcome in stepper.step():
                assert not isinstance(outcome, LmrayError)
                events[request_id].append(outcome)
        told.append(events)
        if speculation is not None:
            assert stepper.stats()["speculation"]["proposed"] > 0
    for events in told[1:]:
        for place in ("0", "3", "9"):
            assert [one.token_id for one in events[place]] == [one.token_id for one in told[0][place]]
            for one, other in zip(events[place], told[0][place], strict=True):
                assert (one.logprob is None) == (other.logprob is None)
                if one.logprob is not None:
                    assert one.logprob.logprob == pytest.approx(other.logprob.logprob, abs=1e-4)
                assert (one.prompt_logprobs is None) == (other.prompt_logprobs is None)


def test_an_answer_held_to_a_grammar_is_the_one_without_speculation(model, model_folder, prompts):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"n": {"enum": ["aaaa", "bbbb"]}}, "required": ["n"]}
    grammar = json.dumps({"grammars": [{"name": "json_schema", "json_schema": schema}]})
    told = []
    for speculation in (None, twin(model_folder), PromptLookup(max_matching_ngram_size=1)):
        stepper = make(model, speculation=speculation, tokenizer=tiny_tokenizer())
        for place in (0, 3):
            stepper.add(Request(str(place), prompts[place], Sampling(30, grammar=grammar)))
        told.append(run(stepper))
    assert told[0] == told[1] == told[2]


NUM_DRAWS = 4000
PLACES = torch.tensor(
    [[0.4, 0.3, 0.2, 0.1], [0.05, 0.05, 0.6, 0.3], [0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]], dtype=torch.double
)
"""Probabilities of four tokens after a prompt, and after each of three proposed tokens."""


@pytest.mark.parametrize("proposed", [(0, 2, 3), (3, 0, 1)], ids=["likely", "unlikely"])
def test_draws_come_as_often_as_the_model_says_whatever_is_proposed(proposed):
    """Of each place, over all draws that reached it; and what is rejected is not drawn."""
    rows = [(Row(Request(str(seed), (0,), Sampling(9, 1.0, seed=seed)), 64), proposed) for seed in range(NUM_DRAWS)]
    for row, _ in rows:
        row.start()
    drawn = Sampler(NO_STOP).verify(rows, PLACES.log().repeat(NUM_DRAWS, 1))
    told = [tuple(one.token_id for one in outcomes) for outcomes in drawn]
    assert all(row.length == len(tokens) - 1 for (row, _), tokens in zip(rows, told, strict=True))
    num_reached = NUM_DRAWS
    for place, probabilities in enumerate(PLACES):
        reached = Counter(tokens[place] for tokens in told if len(tokens) > place)
        assert sum(reached.values()) == num_reached
        observed = [reached[token] for token in range(4)]
        assert chisquare(observed, (probabilities * num_reached).tolist()).pvalue > 0.001, (place, observed)
        num_reached = reached[proposed[place]] if place < len(proposed) else 0
    assert all(tokens[:-1] == proposed[: len(tokens) - 1] for tokens in told)


def test_a_place_that_is_not_a_number_ends_its_request_once_it_is_reached():
    logits = PLACES.log().clone()
    logits[2] = torch.nan

    def told(*proposed: int):
        row = Row(Request("a", (0,), Sampling(9)), 64)
        row.start()
        [outcomes] = Sampler(NO_STOP).verify([(row, proposed)], logits)
        return outcomes

    assert [one.token_id for one in told(1, 2, 3)] == [0]
    first, second, third = told(0, 2, 0)
    assert (first.token_id, second.token_id) == (0, 2)
    assert isinstance(third, LmrayError) and "the model answered with NaN" in str(third)


def test_drafts_of_another_vocabulary_are_refused(model, model_folder, tmp_path):
    other = tiny_model_folder(tmp_path / "other", vocab_size=300)
    with pytest.raises(ConfigError, match=r"has a vocabulary of 300\n  allowed: 264") as caught:
        make(model, speculation=Draft(model=str(other)))
    assert caught.value.where == "engine.speculation.model"
    swapped = tiny_model_folder(tmp_path / "swapped")
    tokenizer = json.loads((swapped / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (swapped / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    config = Native(speculation=Draft(model="small"), max_length=80)
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(ConfigError, match="has other tokens than the model it drafts for"):
        config.with_draft(swapped).check(empty, {})
    config.with_draft(model_folder).check(empty, {})
    assert config.draft == "small"
    assert config.with_draft(swapped).draft == str(swapped)
    assert Native().draft is None and Native(speculation=PromptLookup()).draft is None


def test_a_draft_that_was_not_looked_up_and_one_that_cannot_run_in_blocks_are_refused(model, tmp_path):
    with pytest.raises(ConfigError, match="`smollm2-135m` was not looked up: drafts run in endpoints"):
        make(model, speculation=Draft(model="smollm2-135m"))
    told = {"vocab_size": 264, "n_embd": 32, "n_layer": 1, "n_head": 4}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**told)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot draft: GPT2LMHeadModel is none of"):
        make(model, speculation=Draft(model=str(tmp_path)))
    transformers.T5Config(vocab_size=264).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is no causal language model: Unrecognized configuration class"):
        make(model, speculation=Draft(model=str(tmp_path)))


def test_a_model_that_runs_through_its_own_forward_does_not_speculate(model):
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    config = Native(speculation=PromptLookup(), max_length=80)
    with pytest.raises(ConfigError, match=r"`native` cannot speculate with this model: LlamaMLP has hooks") as caught:
        config.make_stepper(model, stop_token_ids=STOP)
    assert caught.value.where == "engine.speculation"
    with pytest.raises(ConfigError, match="LlamaMLP has hooks"):
        config.check(model, {})
    with torch.device("meta"):
        config.check(transformers.AutoModelForCausalLM.from_config(tiny_config(dtype="bfloat16")), {})


def test_an_engine_without_speculation_tells_none(model):
    assert "speculation" not in make(model).stats()
    told = make(model, speculation=PromptLookup()).stats()["speculation"]
    assert told == {"proposed": 0, "accepted": 0, "acceptance": None, "gain": None, "active": False}


def test_speculation_is_written_by_name_and_its_problems_are_told_with_their_place():
    found = decode(Native, Document("job", {"speculation": {"name": "draft", "model": "smollm2-135m"}}))
    assert found.speculation == Draft(model="smollm2-135m", num_tokens=4)
    assert decode(Native, Document("job", {"speculation": "prompt_lookup"})).speculation == PromptLookup()
    assert decode(Native, Document("job", {"speculation": None})).speculation is None
    for wrong, where in (
        ({"name": "promt_lookup"}, "speculation"),
        ({"name": "draft"}, "speculation.model"),
        ({"name": "prompt_lookup", "num_tokens": 0}, "speculation.num_tokens"),
    ):
        with pytest.raises(ConfigError) as caught:
            decode(Native, Document("job", {"speculation": wrong}))
        assert [problem.where for problem in caught.value.problems] == [f"job: {where}"]
