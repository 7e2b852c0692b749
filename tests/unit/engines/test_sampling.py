"""Draws against `transformers`' own warpers."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lmray.engines._sampling import CANDIDATES, Chooser, draw, logprob_of, process
from lmray.engines.base import Request, Sampling
from lmray.errors import DataError

VOCABULARY = 2 * CANDIDATES
GRID = [(place + 0.5) / 4000 for place in range(4000)]


def logits(spread: float) -> torch.Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(0)) * spread


def expected(logits_V: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    scores = logits_V.double()[None]
    unused = torch.zeros(1, 1, dtype=torch.long)
    scores = TemperatureLogitsWarper(sampling.temperature)(unused, scores)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(unused, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(unused, scores)
    if sampling.min_p:
        scores = MinPLogitsWarper(sampling.min_p)(unused, scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize("spread", [0.1, 3.0], ids=["flat", "peaked"])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1, temperature=1.0),
        Sampling(1, temperature=0.5),
        Sampling(1, temperature=1.0, top_k=5),
        Sampling(1, temperature=1.0, top_p=0.9),
        Sampling(1, temperature=1.5, top_k=40, top_p=0.5),
        Sampling(1, temperature=1.0, top_p=0.01),
        Sampling(1, temperature=1.0, top_k=10 * VOCABULARY),
        Sampling(1, temperature=1.0, min_p=0.1),
        Sampling(1, temperature=1.0, min_p=0.9, top_p=0.99),
        Sampling(1, temperature=2.0, min_p=0.3, top_k=30),
    ],
    ids=str,
)
def test_tokens_come_as_often_as_transformers_says(sampling, spread):
    logits_V = logits(spread)
    drawn = torch.bincount(torch.tensor([draw(logits_V, sampling, uniform) for uniform in GRID]), minlength=VOCABULARY)
    probability = expected(logits_V, sampling)
    torch.testing.assert_close(drawn.double() / len(GRID), probability, atol=2 / len(GRID), rtol=0)
    assert not drawn[probability == 0].any()


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2**-53])
def test_the_ends_of_the_range_are_tokens_too(uniform):
    for sampling in (Sampling(1, temperature=1.0), Sampling(1, temperature=1.0, top_k=3, top_p=0.7)):
        assert 0 <= draw(logits(1.0), sampling, uniform) < VOCABULARY


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", 1e-310),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-300),
        ("repetition_penalty", 101.0),
        ("frequency_penalty", float("inf")),
        ("presence_penalty", float("nan")),
        ("logprobs", -1),
        ("prompt_logprobs", -1),
    ],
)
def test_values_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(DataError, match=rf"{field}: is {value}"):
        Sampling(**{"max_tokens": 1, field: value})


def test_the_repetition_penalty_is_transformers_over_prompt_and_answer():
    logits_V, seen = logits(3.0), [3, 3, 8, 11]
    sampling = Sampling(1, repetition_penalty=1.3)
    found = process(logits_V, sampling, Counter(seen[2:]), prompt=frozenset(seen[:2]))
    expected_V = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([seen]), logits_V.clone()[None])[0]
    torch.testing.assert_close(found, expected_V)
    assert torch.equal(logits_V, logits(3.0)), "what it was given stays as it was"


def test_frequency_and_presence_penalties_count_the_answer_alone():
    sampling = Sampling(1, frequency_penalty=0.5, presence_penalty=0.25)
    found = process(torch.zeros(6), sampling, Counter([2, 2, 2, 5]), prompt=frozenset([1]))
    assert found.tolist() == [0.0, 0.0, -1.75, 0.0, 0.0, -0.75]


def test_biases_are_added_and_what_is_not_allowed_cannot_be_drawn():
    allowed_V = torch.tensor([True, False, True])
    found = process(torch.zeros(3), Sampling(1, logit_bias=((0, 1.5), (1, 100.0))), Counter(), allowed_V=allowed_V)
    assert found.tolist() == [1.5, -torch.inf, 0.0]


def test_a_penalty_takes_no_logit_out_of_the_range_of_numbers():
    logits_V = torch.tensor([3e38, -3e38, 0.0])
    for penalty in (0.01, 100.0):
        found = process(logits_V, Sampling(1, repetition_penalty=penalty), Counter([0, 1]))
        assert found.isfinite().all()
        assert draw(found, Sampling(1, temperature=1e-4, min_p=0.5), 0.5) == 0


@pytest.mark.parametrize("cut", [{}, {"min_p": 0.5}, {"top_p": 0.5}, {"top_k": 1, "min_p": 1.0}], ids=str)
def test_an_infinite_logit_is_drawn_for_certain(cut):
    logits_V = torch.tensor([0.0, torch.inf, -torch.inf])
    assert draw(logits_V, Sampling(1, temperature=0.7, **cut), 0.9) == 1


def drawn(sampling: Sampling, num: int) -> torch.Tensor:
    """How often each of four tokens came in `num` answers of one token, with one seed an answer."""
    logits_V = torch.tensor([1.0, 0.0, -1.0, 0.5])
    choosers = (Chooser(Request("r", (0,), Sampling(**{**vars(sampling), "seed": seed}))) for seed in range(num))
    chosen = [chooser.choose(logits_V, 0)[0] for chooser in choosers]
    return torch.bincount(torch.tensor(chosen), minlength=4).double()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1, temperature=0.7),
        Sampling(1, temperature=1.0, logit_bias=((2, 2.0), (0, -1.0))),
        Sampling(1, temperature=1.0, repetition_penalty=2.0),
        Sampling(1, temperature=1.3, min_p=0.3),
    ],
    ids=str,
)
def test_seeded_draws_are_distributed_as_they_should_by_pearsons_test(sampling):
    """A chi-squared statistic with 3 degrees of freedom is above 16.3 in one of 1000 sets of seeds; these are fixed."""
    logits_V = process(torch.tensor([1.0, 0.0, -1.0, 0.5]), sampling, Counter(), prompt=frozenset([0]))
    expected_V = 4000 * expected(logits_V, sampling)
    counts_V, possible_V = drawn(sampling, 4000), expected_V > 0
    assert not counts_V[~possible_V].any()
    statistic = ((counts_V - expected_V).square() / expected_V)[possible_V].sum()
    assert statistic < 16.3


def test_penalties_follow_what_the_answer_says():
    chooser = Chooser(Request("r", (1,), Sampling(9, frequency_penalty=1.0)))
    logits_V = torch.tensor([2.7, 1.1, 0.0])
    assert [chooser.choose(logits_V, 0)[0] for _ in range(6)] == [0, 0, 1, 0, 1, 2]


def test_logprobs_are_the_models_own_whatever_was_drawn():
    logits_V = logits(2.0)
    sampling = Sampling(1, temperature=0.1, logit_bias=((7, 100.0),), logprobs=3)
    token, told = Chooser(Request("r", (1,), sampling)).choose(logits_V, int(logits_V.argmax()))
    own = logits_V.log_softmax(0)
    assert token == 7
    assert told == logprob_of(logits_V, 7, 3)
    assert told is not None and told.logprob == pytest.approx(float(own[7]))
    assert [one for one, _ in told.top] == own.topk(3).indices.tolist()
    assert [value for _, value in told.top] == pytest.approx(own.topk(3).values.tolist())
    assert Chooser(Request("r", (1,), Sampling(1))).choose(logits_V, 0)[1] is None


def test_a_prompts_logprobs_are_those_of_each_token_after_the_ones_before():
    generator = torch.Generator().manual_seed(1)
    logits_TV, prompt_ids = torch.randn(300, 9, generator=generator), tuple(place % 9 for place in range(300))
    chooser = Chooser(Request("r", prompt_ids, Sampling(1, prompt_logprobs=2)))
    chooser.read(torch.randn(40, 9, generator=generator))  # and then it was read from the start
    for start, end in ((0, 30), (30, 31), (31, 300)):
        chooser.read(logits_TV[start:end], start)
    told = chooser.prompt_logprobs()
    assert told is not None
    assert told[0] is None
    assert len(told) == 300
    for place in (1, 29, 30, 31, 32, 127, 128, 129, 299):
        assert told[place] == logprob_of(logits_TV[place - 1], prompt_ids[place], 2)
    assert Chooser(Request("r", prompt_ids, Sampling(1))).prompt_logprobs() is None


def test_seeds_that_differ_in_their_sign_draw_other_tokens():
    """Answers of one request have seeds side by side, on both sides of zero too."""
    logits = torch.zeros(VOCABULARY)

    def drawn(seed: int) -> list[int]:
        chooser = Chooser(Request("r", (0,), Sampling(8, temperature=1.0, seed=seed)))
        return [chooser.choose(logits, 0)[0] for _ in range(8)]

    assert len({tuple(drawn(seed)) for seed in range(-3, 4)}) == 7 and drawn(-2) == drawn(-2)
